package io.mtpexport.core

/** The phone, with the fields of `mtp_export/device/protocol.py`. */
data class Phone(val machine: String, val cpu: String, val system: String, val versions: Map<String, String>)

/** The speed of one kind of text, or of all. */
data class Speed(val kind: String, val off: Double, val on: Double) {
    val gain: Double? get() = if (off > 0) on / off else null
}

/** The JSON that the headless run leaves for `adb pull`: `mtp_export/device/app.py` reads it. */
object Report {
    fun build(phone: Phone, manifest: Manifest, request: Request, runs: List<VariantRun>): Map<String, Any?> = linkedMapOf(
        "place" to linkedMapOf(
            "where" to "phone",
            "machine" to phone.machine,
            "cpu" to phone.cpu,
            "system" to phone.system,
            "emulator" to null,
            "versions" to phone.versions,
        ),
        "model" to manifest.model,
        "recipe" to manifest.recipe,
        "container_sha256" to manifest.container.sha256,
        "backend" to request.processor.word,
        "runs" to runs.map { run ->
            linkedMapOf("num_draft_tokens" to if (run.useMtp) manifest.numDraftTokens else 0, "run" to stockRun(run))
        },
        "speed" to speeds(request.prompts, runs).map { speed ->
            linkedMapOf(
                "kind" to speed.kind,
                "tokens_per_second_off" to speed.off,
                "tokens_per_second_on" to speed.on,
                "mtp_gain" to speed.gain,
            )
        },
        "prompts" to request.prompts.mapIndexed { i, prompt ->
            val (off, on) = listOf(false, true).map { mtp -> runs.single { it.useMtp == mtp }.outputs[i].first().text }
            linkedMapOf("id" to prompt.id, "kind" to prompt.kind, "same_text" to sameText(off, on))
        },
    )

    /** The speeds of all prompts, and by kind of text. */
    fun speeds(prompts: List<Prompt>, runs: List<VariantRun>): List<Speed> {
        val (off, on) = listOf(false, true).map { mtp -> runs.single { it.useMtp == mtp } }
        val all = prompts.indices.toList()
        return (listOf("all" to all) + all.groupBy { prompts[it].kind }.toList()).map { (kind, chosen) ->
            Speed(kind, Statistics.tokensPerSecond(off, chosen), Statistics.tokensPerSecond(on, chosen))
        }
    }

    /** LiteRT-LM commits its last round whole: with MTP the text may go on after where it ends without. */
    fun sameText(off: String, on: String): Boolean = on.startsWith(off)

    private fun stockRun(run: VariantRun) = linkedMapOf(
        "outputs" to run.outputs.flatten().map { output ->
            linkedMapOf(
                "text" to output.text,
                "num_tokens" to output.numTokens,
                "decode_ms" to output.decodeMs,
                "first_token_ms" to output.firstTokenMs,
            )
        },
        "load_ms" to run.notes.loadMs,
        "acceptance_rate" to run.notes.acceptanceRate,
        "peak_memory_bytes" to run.notes.peakMemoryBytes,
        "warnings" to run.notes.warnings,
    )
}
