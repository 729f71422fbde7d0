package io.mtpexport.app

import android.app.Instrumentation
import android.os.Bundle
import io.mtpexport.core.Bundles
import io.mtpexport.core.Output
import io.mtpexport.core.Processor
import io.mtpexport.core.Report

/**
 * On a phone: the first bundle in the app's folder writes the same text with MTP as without, and drafts are accepted.
 *
 *     adb shell am instrument -w io.mtpexport.demo.test/io.mtpexport.app.LiteRtLmTest
 *
 * An `Instrumentation` of its own, without AndroidX: it uses the installed app as it is, and keeps the bundle that was
 * pushed there, which Gradle's `connectedAndroidTest` would delete.
 */
class LiteRtLmTest : Instrumentation() {
    override fun onCreate(arguments: Bundle?) {
        super.onCreate(arguments)
        start()
    }

    override fun onStart() {
        val problems = test()
        finish(if (problems.isEmpty()) 0 else 1, Bundle().apply { putString("stream", report(problems)) })
    }

    private fun test(): List<String> {
        val root = targetContext.bundles()
        val bundle = Bundles.list(root).first.firstOrNull() ?: return listOf("no bundle in $root")
        bundle.manifest.check(bundle.container)
        val (off, _) = generated(bundle, useMtp = false)
        val (on, rate) = generated(bundle, useMtp = true)
        return listOfNotNull(
            if (off.numTokens < TOKENS) "${off.numTokens} tokens were generated, expected $TOKENS" else null,
            if (!Report.sameText(off.text, on.text)) "MTP changes the text: '${off.text}' became '${on.text}'" else null,
            if (rate == null) "the runtime reported no acceptance" else null,
            if (rate == 0.0) "no draft was accepted" else null,
        )
    }

    private fun generated(bundle: io.mtpexport.core.Bundle, useMtp: Boolean): Pair<Output, Double?> {
        val engine = LiteRtLm(bundle, bundle.manifest.context(null), Processor.CPU, 4, useMtp, targetContext.runtimeCache())
        val output = engine.use { it.generate("def fibonacci(n):\n", TOKENS) }
        return output to engine.notes().acceptanceRate
    }

    private fun report(problems: List<String>) =
        if (problems.isEmpty()) "OK\n" else problems.joinToString("\n", "FAILED\n", "\n")

    private companion object {
        const val TOKENS = 32
    }
}
