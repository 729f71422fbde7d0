package io.mtpexport.core

/** A prompt and the kind of text it is. */
data class Prompt(val id: String, val kind: String, val text: String) {
    companion object {
        /** Read a JSONL of prompts, as `mtp-export` does. */
        fun parseLines(text: String): List<Prompt> = text.lines().filter { it.isNotBlank() }.mapIndexed { i, line ->
            val json = Json.parse(line) as? Map<*, *> ?: throw JsonException("prompt ${i + 1} is no object")
            Prompt(json["id"] as? String ?: "line-${i + 1}", json["kind"] as? String ?: "any", json.need("text"))
        }
    }
}

/** What one generation gave: its text, how many tokens, and how long decoding and the first token took. */
data class Output(val text: String, val numTokens: Int, val decodeMs: Double, val firstTokenMs: Double)

/** Whoever generates: LiteRT-LM on a phone, something else in a test. MTP is fixed when it is opened. */
interface Generator : AutoCloseable {
    fun generate(prompt: String, maxNewTokens: Int): Output
}

/** One variant's outputs by prompt and repetition. */
data class VariantRun(val useMtp: Boolean, val outputs: List<List<Output>>)

/** The order of a measurement: each variant is opened by itself, warmed up once, then runs every prompt [repetitions] times. */
class RunProtocol(
    private val prompts: List<Prompt>,
    private val maxNewTokens: Int,
    private val repetitions: Int,
    private val open: (useMtp: Boolean) -> Generator,
) {
    init {
        require(prompts.isNotEmpty()) { "no prompts" }
        require(maxNewTokens > 0 && repetitions > 0) { "tokens and repetitions must be 1 or more" }
    }

    fun run(onProgress: (String) -> Unit = {}): List<VariantRun> = listOf(false, true).map { useMtp ->
        open(useMtp).use { generator ->
            onProgress("warm-up, MTP ${if (useMtp) "on" else "off"}")
            generator.generate(prompts.first().text, minOf(maxNewTokens, 8))
            VariantRun(
                useMtp,
                prompts.map { prompt ->
                    List(repetitions) { i ->
                        onProgress("${prompt.id}, MTP ${if (useMtp) "on" else "off"}, run ${i + 1} of $repetitions")
                        generator.generate(prompt.text, maxNewTokens)
                    }
                },
            )
        }
    }
}

object Statistics {
    fun median(values: List<Double>): Double {
        require(values.isNotEmpty()) { "the median of nothing" }
        val sorted = values.sorted()
        val middle = sorted.size / 2
        return if (sorted.size % 2 == 1) sorted[middle] else (sorted[middle - 1] + sorted[middle]) / 2
    }

    /** Tokens per second of decoding: the median over repetitions, over all prompts of [chosen]. */
    fun tokensPerSecond(run: VariantRun, chosen: List<Int>): Double {
        val ms = chosen.sumOf { prompt -> median(run.outputs[prompt].map { it.decodeMs }) }
        val tokens = chosen.sumOf { prompt -> median(run.outputs[prompt].map { it.numTokens.toDouble() }) }
        return if (ms > 0) 1000.0 * tokens / ms else 0.0
    }
}
