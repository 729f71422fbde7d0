package io.mtpexport.app

import android.app.Activity
import android.os.Bundle
import android.view.WindowManager
import android.widget.TextView
import io.mtpexport.core.BundleException
import io.mtpexport.core.Bundles
import io.mtpexport.core.Json
import io.mtpexport.core.Report
import io.mtpexport.core.Request
import io.mtpexport.core.RunProtocol
import java.io.File
import kotlin.concurrent.thread

/**
 * The app without a user: reads the request that an intent's extra `request` names, and writes the answer beside it.
 *
 *     am start -n io.mtpexport.demo/io.mtpexport.app.RunActivity --es request FILE
 *
 * It is an activity, because Android gives the visible app the fast cores, and ends it last.
 */
class RunActivity : Activity() {
    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        window.addFlags(WindowManager.LayoutParams.FLAG_KEEP_SCREEN_ON)
        val status = TextView(this)
        setContentView(status)
        val request = File(files(), intent.getStringExtra("request") ?: return finish())
        val answer = File(request.path.removeSuffix(".json") + ".answer.json")
        thread(name = "run") {
            val result = try {
                run(request) { line -> runOnUiThread { status.text = line } }
            } catch (error: Exception) { // the runner at the other end of the cable reads it
                mapOf("error" to (error.message ?: error.toString()))
            }
            Bundles.write(answer) { it.write(Json.write(result).toByteArray()) }
            finish()
        }
    }

    private fun run(file: File, onProgress: (String) -> Unit): Map<String, Any?> {
        val request = Request.parse(file.readText())
        val bundle = Bundles.open(File(bundles(), request.bundle))
        bundle.manifest.check(bundle.container)
        memoryProblem(bundle)?.let { throw BundleException(it) }
        val contextLength = bundle.manifest.context(request.contextLength)
        val protocol = RunProtocol(request.prompts, request.maxNewTokens, request.repetitions) { useMtp ->
            runtimeCache().deleteRecursively() // neither variant profits from the other's cache
            LiteRtLm(bundle, contextLength, request.processor, request.threads, useMtp, runtimeCache())
        }
        return Report.build(phone(), bundle.manifest, request, protocol.run(onProgress))
    }
}
