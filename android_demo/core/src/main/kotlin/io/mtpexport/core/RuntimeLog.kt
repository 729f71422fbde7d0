package io.mtpexport.core

/** What LiteRT-LM tells only in its log; word for word that of `mtp_export/stock_runtime.py`, held by `tests/end_to_end/golden`. */
object RuntimeLog {
    private val ACCEPTANCE = Regex("MTP Drafter - Success rate: ([0-9.e+-]+)$", RegexOption.MULTILINE)
    private val PREFIX = Regex("^.*?\\.(?:cc|h|cpp):\\d+\\] ")

    /** Accepted per drafted tokens, as the engine says when it closes; null where it does not. */
    fun acceptanceRate(log: String): Double? = ACCEPTANCE.findAll(log).lastOrNull()?.groupValues?.get(1)?.toDoubleOrNull()

    /** What runs elsewhere than it was asked to, in the runtime's own words. */
    fun warnings(log: String): List<String> =
        log.lines().filter { it.contains("falling back to CPU", ignoreCase = true) }
            .map { it.replace(PREFIX, "").trim() }
            .distinct()
}
