package io.mtpexport.app

import android.app.Activity
import android.text.InputType
import android.view.View
import android.view.ViewGroup.LayoutParams.MATCH_PARENT
import android.view.ViewGroup.LayoutParams.WRAP_CONTENT
import android.widget.ArrayAdapter
import android.widget.Button
import android.widget.CheckBox
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.Spinner
import android.widget.TableLayout
import android.widget.TableRow
import android.widget.TextView
import io.mtpexport.core.Bundle
import io.mtpexport.core.Manifest
import io.mtpexport.core.Processor

/** The user's choice at the top of the screen. [contextLength] is null for the bundle's own. */
class Choice(
    val bundle: Bundle,
    val processor: Processor,
    val threads: Int,
    val useMtp: Boolean,
    val contextLength: Int?,
)

/** The views; the activity gives them their meaning. Use it on the main thread only. */
class Screen(
    private val activity: Activity,
    onAdd: () -> Unit,
    onLoad: (Choice) -> Unit,
    onSend: (String) -> Unit,
    onCompare: (Choice) -> Unit,
) {
    private val bundles = Spinner(activity)
    private val gpu = CheckBox(activity).apply { text = "GPU" }
    private val mtp = CheckBox(activity).apply { text = "MTP"; isChecked = true }
    // As long as the app needs it: caches of the longest context take memory that a phone may not have.
    private val context = EditText(activity).apply {
        hint = "Context"
        inputType = InputType.TYPE_CLASS_NUMBER
    }
    private val status = TextView(activity)
    private val table = TableLayout(activity)
    private val chat = TextView(activity).apply { setTextIsSelectable(true) }
    private val message = EditText(activity).apply { hint = "Message" }
    private var listed = emptyList<Bundle>()

    init {
        val send = button("Send") {
            onSend(message.text.toString())
            message.text.clear()
        }
        val load = button("Load") { choice()?.let(onLoad) }
        val compare = button("Compare") { choice()?.let(onCompare) }
        val top = row(load, compare, button("Add…", onAdd))
        val scroll = ScrollView(activity).apply { addView(column(table, chat)) }
        val all = column(bundles, row(gpu, mtp, context), top, status)
        all.addView(scroll, LinearLayout.LayoutParams(MATCH_PARENT, 0, 1f))
        all.addView(LinearLayout(activity).apply {
            addView(message, LinearLayout.LayoutParams(0, WRAP_CONTENT, 1f))
            addView(send)
        })
        activity.setContentView(all)
    }

    fun show(available: List<Bundle>) {
        listed = available
        bundles.adapter = ArrayAdapter(activity, android.R.layout.simple_spinner_dropdown_item, available.map { it.title })
    }

    fun showTable(rows: List<List<String>>) {
        table.removeAllViews()
        for (cells in rows) {
            table.addView(TableRow(activity).apply {
                for (cell in cells) addView(TextView(activity).apply { text = cell; setPadding(0, 0, 24, 0) })
            })
        }
    }

    fun status(text: String) {
        status.text = text
    }

    fun append(text: String) = chat.append(text)

    private fun choice(): Choice? = listed.getOrNull(bundles.selectedItemPosition)?.let { bundle ->
        val contextLength = Manifest.chosenContext(context.text.toString())
        Choice(bundle, if (gpu.isChecked) Processor.GPU else Processor.CPU, THREADS, mtp.isChecked, contextLength)
    }

    private fun button(label: String, onClick: () -> Unit) = Button(activity).apply {
        text = label
        setOnClickListener { onClick() }
    }

    private fun row(vararg views: View) = LinearLayout(activity).apply { views.forEach(::addView) }

    private fun column(vararg views: View) = row(*views).apply { orientation = LinearLayout.VERTICAL }

    private companion object {
        const val THREADS = 4
    }
}
