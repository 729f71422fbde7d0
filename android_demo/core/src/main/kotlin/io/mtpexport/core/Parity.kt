package io.mtpexport.core

/** The near-tie rule of `mtp_runtime/measure/parity.py`; both are tested against `tests/end_to_end/golden`. */
enum class Verdict { EQUAL, NEAR_TIE, DIFFERENT }

/**
 * One prompt's output compared with the reference's: [agreed] leading tokens of the [compared] ones are equal, and
 * [margin] is the reference's top-1 minus top-2 logit at [firstDifference] (null where it had already ended).
 */
data class Comparison(
    val prompt: String,
    val compared: Int,
    val agreed: Int,
    val firstDifference: Int?,
    val margin: Double?,
    val verdict: Verdict,
)

object Parity {
    /** Compare the first [maxNewTokens] of two outputs; one that ends earlier differs where it ends. */
    fun compareTokens(
        prompt: String,
        reference: List<Int>,
        tokens: List<Int>,
        margins: List<Double>,
        tolerance: Double,
        maxNewTokens: Int,
    ): Comparison {
        val expected = reference.take(maxNewTokens)
        val actual = tokens.take(maxNewTokens)
        val agreed = expected.zip(actual).takeWhile { (a, b) -> a == b }.size
        return judge(prompt, agreed, maxOf(expected.size, actual.size), expected.size, margins, tolerance)
    }

    /** Compare the text that each reference token adds with a whole [text], which may go on after the reference's end. */
    fun compareText(
        prompt: String,
        pieces: List<String>,
        text: String,
        margins: List<Double>,
        tolerance: Double,
    ): Comparison {
        var agreed = 0
        var start = 0
        for (piece in pieces) {
            if (!text.startsWith(piece, start)) break
            start += piece.length
            agreed++
        }
        return judge(prompt, agreed, pieces.size, pieces.size, margins, tolerance)
    }

    private fun judge(
        prompt: String,
        agreed: Int,
        compared: Int,
        referenceLength: Int,
        margins: List<Double>,
        tolerance: Double,
    ): Comparison {
        require(margins.size >= referenceLength) { "$referenceLength reference tokens have ${margins.size} margins" }
        if (agreed == compared) return Comparison(prompt, compared, agreed, null, null, Verdict.EQUAL)
        val margin = if (agreed < referenceLength) margins[agreed] else null
        val verdict = if (margin != null && margin <= tolerance) Verdict.NEAR_TIE else Verdict.DIFFERENT
        return Comparison(prompt, compared, agreed, agreed, margin, verdict)
    }
}
