package io.mtpexport.app

import android.app.Activity
import android.app.AlertDialog
import android.content.Intent
import android.net.Uri
import android.os.Bundle
import android.provider.OpenableColumns
import android.view.WindowManager
import io.mtpexport.core.Bundles
import io.mtpexport.core.Prompt
import io.mtpexport.core.Report
import io.mtpexport.core.Request
import io.mtpexport.core.RunProtocol
import io.mtpexport.core.VariantRun
import java.io.FileNotFoundException
import java.util.concurrent.Executors

/** A bundle chosen, a chat with MTP on or off, and both side by side. */
class MainActivity : Activity() {
    private val worker = Executors.newSingleThreadExecutor()
    private lateinit var screen: Screen
    private var open: LiteRtLm? = null // the worker's

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        window.addFlags(WindowManager.LayoutParams.FLAG_KEEP_SCREEN_ON)
        screen = Screen(this, onAdd = ::choose, onLoad = ::load, onSend = ::send, onCompare = ::compare)
        listBundles()
    }

    override fun onDestroy() {
        inBackground { close() }
        worker.shutdown()
        super.onDestroy()
    }

    private fun listBundles() {
        val (available, problems) = Bundles.list(bundles())
        screen.show(available)
        val none = "no bundle: add its manifest.json and its .litertlm, or push its folder to ${bundles()}"
        screen.status(if (available.isEmpty() && problems.isEmpty()) none else problems.joinToString("\n"))
    }

    private fun choose() {
        val intent = Intent(Intent.ACTION_OPEN_DOCUMENT).setType("*/*").addCategory(Intent.CATEGORY_OPENABLE)
        startActivityForResult(intent.putExtra(Intent.EXTRA_ALLOW_MULTIPLE, true), CHOOSE)
    }

    override fun onActivityResult(requestCode: Int, resultCode: Int, data: Intent?) {
        if (requestCode != CHOOSE || resultCode != RESULT_OK || data == null) return
        val clip = data.clipData
        val chosen = if (clip != null) List(clip.itemCount) { clip.getItemAt(it).uri } else listOfNotNull(data.data)
        inBackground {
            say("copying and checking")
            Bundles.import(
                bundles(),
                chosen.associate { uri ->
                    nameOf(uri) to { contentResolver.openInputStream(uri) ?: throw FileNotFoundException("$uri") }
                },
            )
            runOnUiThread(::listBundles)
        }
    }

    private fun nameOf(uri: Uri): String = contentResolver.query(uri, null, null, null, null)?.use { row ->
        row.moveToFirst()
        row.getString(row.getColumnIndex(OpenableColumns.DISPLAY_NAME))
    } ?: throw FileNotFoundException("$uri has no name")

    private fun load(choice: Choice) {
        val problem = memoryProblem(choice.bundle) ?: return loadNow(choice)
        AlertDialog.Builder(this).setMessage(problem)
            .setPositiveButton("Load anyway") { _, _ -> loadNow(choice) }
            .setNegativeButton("Cancel", null)
            .show()
    }

    private fun loadNow(choice: Choice) = inBackground {
        close()
        say("checking ${choice.bundle.container.name}")
        choice.bundle.manifest.check(choice.bundle.container)
        say("loading")
        val context = choice.bundle.manifest.context(choice.contextLength)
        open = LiteRtLm(choice.bundle, context, choice.processor, choice.threads, choice.useMtp, runtimeCache())
        say(listOf("loaded, MTP ${if (choice.useMtp) "on" else "off"}, context $context tokens") + open!!.warnings())
    }

    private fun send(message: String) = inBackground {
        val engine = open ?: return@inBackground say("load a bundle first")
        runOnUiThread { screen.append("\n> $message\n") }
        val onRestart = { runOnUiThread { screen.append("(the conversation cannot go on: a new one begins)\n") } }
        val output = engine.answer(message, onRestart) { piece -> runOnUiThread { screen.append(piece) } }
        val speed = if (output.decodeMs > 0) 1000 * output.numTokens / output.decodeMs else 0.0
        say(listOf("%.1f tokens/s, first after %.0f ms".format(speed, output.firstTokenMs)) + engine.warnings())
    }

    private fun compare(choice: Choice) = inBackground {
        close()
        choice.bundle.manifest.check(choice.bundle.container)
        val lines = assets.open("heldout.jsonl").use { it.readBytes().decodeToString() }
        val prompts = Prompt.inTurn(Prompt.parseLines(lines), COMPARED)
        val context = choice.bundle.manifest.context(choice.contextLength)
        val request = Request(choice.bundle.folder.name, prompts, NEW_TOKENS, 1, choice.processor, choice.threads, context)
        val protocol = RunProtocol(prompts, request.maxNewTokens, request.repetitions) { useMtp ->
            runtimeCache().deleteRecursively()
            LiteRtLm(choice.bundle, context, choice.processor, choice.threads, useMtp, runtimeCache())
        }
        val runs = protocol.run(::say)
        runOnUiThread { screen.showTable(table(prompts, runs)) }
        say(runs.flatMap { it.notes.warnings }.distinct())
    }

    /** Off and on beside each other, by kind of text. */
    private fun table(prompts: List<Prompt>, runs: List<VariantRun>): List<List<String>> {
        val (off, on) = listOf(false, true).map { mtp -> runs.single { it.useMtp == mtp } }
        val same = prompts.indices.count { Report.sameText(off.outputs[it].first().text, on.outputs[it].first().text) }
        val rate = on.notes.acceptanceRate
        return listOf(listOf("", "MTP off", "MTP on", "gain")) +
            Report.speeds(prompts, runs).map { speed ->
                val gain = speed.gain?.let { "%.2fx".format(it) } ?: "–"
                listOf("${speed.kind}, tokens/s", "%.1f".format(speed.off), "%.1f".format(speed.on), gain)
            } +
            listOf(
                listOf("memory, MB") + listOf(off, on).map { "${it.notes.peakMemoryBytes / 1_000_000}" } + "",
                listOf("accepted drafts", "–", if (rate == null) "unknown" else "%.0f %%".format(100 * rate), ""),
                listOf("same text", "", "$same of ${prompts.size}", ""),
            )
    }

    private fun close() {
        open?.close()
        open = null
    }

    private fun say(text: String) = runOnUiThread { screen.status(text) }

    private fun say(lines: List<String>) = say(lines.joinToString("\n"))

    private fun inBackground(work: () -> Unit) {
        worker.execute {
            try {
                work()
            } catch (error: Exception) { // every error of the runtime is shown
                say(error.message ?: error.toString())
            }
        }
    }

    private companion object {
        const val CHOOSE = 1
        const val COMPARED = 4
        const val NEW_TOKENS = 128
    }
}
