package io.mtpexport.core

/** What ran where: stamped on every report. */
data class Phone(val machine: String, val cpu: String, val system: String, val backend: String)

/** The JSON that the headless run leaves for `adb pull`: whether MTP changed the text, and what it gained by kind. */
object Report {
    fun build(phone: Phone, manifest: Manifest, prompts: List<Prompt>, runs: List<VariantRun>): Map<String, Any?> {
        val plain = runs.single { !it.useMtp }
        val drafted = runs.single { it.useMtp }
        val all = prompts.indices.toList()
        return linkedMapOf(
            "where" to "phone",
            "machine" to phone.machine,
            "cpu" to phone.cpu,
            "system" to phone.system,
            "backend" to phone.backend,
            "model" to manifest.model,
            "recipe" to manifest.recipe,
            "bundle_sha256" to manifest.container.sha256,
            "num_draft_tokens" to manifest.numDraftTokens,
            "speed" to (listOf("all" to all) + all.groupBy { prompts[it].kind }.toList()).map { (kind, chosen) ->
                val off = Statistics.tokensPerSecond(plain, chosen)
                val on = Statistics.tokensPerSecond(drafted, chosen)
                linkedMapOf(
                    "kind" to kind,
                    "tokens_per_second_off" to off,
                    "tokens_per_second_on" to on,
                    "mtp_gain" to if (off > 0) on / off else null,
                )
            },
            "prompts" to prompts.mapIndexed { i, prompt ->
                val (off, on) = plain.outputs[i].first().text to drafted.outputs[i].first().text
                linkedMapOf(
                    "id" to prompt.id,
                    "kind" to prompt.kind,
                    "same_text" to sameText(off, on),
                    "text_off" to off,
                    "text_on" to on,
                )
            },
        )
    }

    /** LiteRT-LM commits its last round whole: with MTP the text may go on after where it ends without. */
    fun sameText(off: String, on: String): Boolean = on.startsWith(off)
}
