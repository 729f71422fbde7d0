package io.mtpexport.core

/** A prompt and the kind of text it is. */
data class Prompt(val id: String, val kind: String, val text: String) {
    companion object {
        /** Read a JSONL of prompts, as `mtp-export` does. */
        fun parseLines(text: String): List<Prompt> = text.lines().filter { it.isNotBlank() }.mapIndexed { i, line ->
            parse(Json.parse(line), "line-${i + 1}")
        }

        /** The first [limit] prompts of all kinds in turn. */
        fun inTurn(prompts: List<Prompt>, limit: Int): List<Prompt> {
            val byKind = prompts.groupBy { it.kind }.values
            return List(byKind.maxOf { it.size }) { i -> byKind.mapNotNull { it.getOrNull(i) } }.flatten().take(limit)
        }

        fun parse(json: Any?, name: String): Prompt {
            json as? Map<*, *> ?: throw JsonException("prompt $name is no object")
            return Prompt(json["id"] as? String ?: name, json["kind"] as? String ?: "any", json.need("text"))
        }
    }
}

enum class Processor(val word: String) { CPU("cpu"), GPU("gpu") }

/** The runner's request to the app, written by `mtp_export/device/app.py`. */
data class Request(
    val bundle: String,
    val prompts: List<Prompt>,
    val maxNewTokens: Int,
    val repetitions: Int,
    val processor: Processor,
    val threads: Int,
    val contextLength: Int,
) {
    companion object {
        fun parse(text: String): Request {
            val json = Json.parse(text) as? Map<*, *> ?: throw JsonException("a request is an object")
            val word = json.need<String>("backend")
            return Request(
                bundle = json.need("bundle"),
                prompts = json.need<List<*>>("prompts").mapIndexed { i, prompt -> Prompt.parse(prompt, "${i + 1}") },
                maxNewTokens = json.needInt("max_new_tokens"),
                repetitions = json.needInt("repetitions"),
                processor = Processor.entries.find { it.word == word }
                    ?: throw JsonException("backend is $word, expected one of ${Processor.entries.map { it.word }}"),
                threads = json.needInt("threads"),
                contextLength = json.needInt("context_length"),
            )
        }
    }
}

/** One generation: its text, number of tokens, and times of decoding and of the first token. */
data class Output(val text: String, val numTokens: Int, val decodeMs: Double, val firstTokenMs: Double)

/** Figures of a variant after it is closed: the runtime writes acceptance only then, to its log. */
data class Notes(val loadMs: Double, val acceptanceRate: Double?, val peakMemoryBytes: Long, val warnings: List<String>)

/** A text generator: LiteRT-LM on a phone, another in a test. MTP is fixed when it is opened. */
interface Generator : AutoCloseable {
    fun generate(prompt: String, maxNewTokens: Int): Output

    /** The figures; call it after [close]. */
    fun notes(): Notes
}

/** One variant's outputs by prompt and repetition. */
data class VariantRun(val useMtp: Boolean, val outputs: List<List<Output>>, val notes: Notes)

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
        val generator = open(useMtp)
        val outputs = generator.use {
            onProgress("warm-up, MTP ${if (useMtp) "on" else "off"}")
            generator.generate(prompts.first().text, minOf(maxNewTokens, 8))
            prompts.map { prompt ->
                List(repetitions) { i ->
                    onProgress("${prompt.id}, MTP ${if (useMtp) "on" else "off"}, run ${i + 1} of $repetitions")
                    generator.generate(prompt.text, maxNewTokens)
                }
            }
        }
        VariantRun(useMtp, outputs, generator.notes())
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
