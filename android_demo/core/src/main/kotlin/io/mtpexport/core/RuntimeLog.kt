package io.mtpexport.core

/** Values that LiteRT-LM writes only to its log, read as in `mtp_export/check/stock_runtime.py`; tested by `tests/end_to_end/golden`. */
object RuntimeLog {
    private val ACCEPTANCE = Regex("MTP Drafter - Success rate: ([0-9.e+-]+)$", RegexOption.MULTILINE)
    private val PREFIX = Regex("^.*?\\.(?:cc|h|cpp):\\d+\\] ")

    /** Accepted per drafted tokens, which the engine logs when it closes; null where it logs none. */
    fun acceptanceRate(log: String): Double? = ACCEPTANCE.findAll(log).lastOrNull()?.groupValues?.get(1)?.toDoubleOrNull()

    /** The runtime's lines about work that fell back to the CPU. */
    fun warnings(log: String): List<String> =
        log.lines().filter { it.contains("falling back to CPU", ignoreCase = true) }
            .map { it.replace(PREFIX, "").trim() }
            .distinct()
}
