package io.mtpexport.app

import com.google.ai.edge.litertlm.Backend
import com.google.ai.edge.litertlm.Capabilities
import com.google.ai.edge.litertlm.Content
import com.google.ai.edge.litertlm.Contents
import com.google.ai.edge.litertlm.Conversation
import com.google.ai.edge.litertlm.ConversationConfig
import com.google.ai.edge.litertlm.Engine
import com.google.ai.edge.litertlm.EngineConfig
import com.google.ai.edge.litertlm.ExperimentalApi
import com.google.ai.edge.litertlm.ExperimentalFlags
import com.google.ai.edge.litertlm.LiteRtLmJniException
import com.google.ai.edge.litertlm.LogSeverity
import com.google.ai.edge.litertlm.Message
import com.google.ai.edge.litertlm.MessageCallback
import com.google.ai.edge.litertlm.SamplerConfig
import io.mtpexport.core.Bundle
import io.mtpexport.core.BundleException
import io.mtpexport.core.Call
import io.mtpexport.core.ChatMessage
import io.mtpexport.core.ChatReply
import io.mtpexport.core.ChatRuntime
import io.mtpexport.core.Chats
import io.mtpexport.core.Generator
import io.mtpexport.core.Notes
import io.mtpexport.core.Output
import io.mtpexport.core.Part
import io.mtpexport.core.PeakMemory
import io.mtpexport.core.Processor
import io.mtpexport.core.Role
import io.mtpexport.core.RuntimeLog
import java.io.File
import java.util.concurrent.CountDownLatch

/**
 * LiteRT-LM with one bundle, opened for [contextLength] tokens ([io.mtpexport.core.Manifest.context]). Opening takes
 * seconds: never on the main thread, and one at a time.
 */
@OptIn(ExperimentalApi::class)
class LiteRtLm(
    bundle: Bundle,
    contextLength: Int,
    processor: Processor,
    threads: Int,
    useMtp: Boolean,
    cache: File,
) : Generator {
    private val log = OwnLog()
    private val memory = PeakMemory()
    private val engine: Engine
    private val loadMs: Double
    private var chat: Conversation? = null
    private var acceptanceRate: Double? = null

    init {
        val path = bundle.container.path
        // Without this check an engine with MTP on fails deep in native code.
        if (useMtp && !Capabilities(path).use { it.hasSpeculativeDecodingSupport() }) {
            throw BundleException("${bundle.container.name} has no drafter that LiteRT-LM sees: export it again, or go without MTP")
        }
        Engine.setNativeMinLogSeverity(LogSeverity.INFO)
        // Global, and read when an engine is created.
        ExperimentalFlags.enableBenchmark = true
        ExperimentalFlags.enableSpeculativeDecoding = useMtp
        val backend = if (processor == Processor.GPU) Backend.GPU() else Backend.CPU(threadCount = threads)
        val started = System.nanoTime()
        engine = Engine(
            EngineConfig(
                modelPath = path,
                backend = backend,
                maxNumTokens = contextLength,
                cacheDir = cache.apply { mkdirs() }.path,
            ),
        )
        try {
            engine.initialize()
        } catch (error: LiteRtLmJniException) {
            memory.close()
            throw error
        }
        loadMs = (System.nanoTime() - started) / 1e6
    }

    /** What fell back to another processor so far, in the runtime's own words. */
    fun warnings(): List<String> = RuntimeLog.warnings(log.read())

    override fun generate(prompt: String, maxNewTokens: Int): Output =
        conversation(RAW, ConversationConfig(samplerConfig = GREEDY, maxOutputToken = maxNewTokens)).use {
            val text = it.sendMessage(prompt).toString()
            output(text, it)
        }

    /**
     * Answer in the chat that goes on until this is closed; [onPiece] gets the text as it comes. The bundle's own chat
     * template and sampler are used, and drafts need no setting: the cache holds the same with them. Where a reply is empty
     * the chat cannot go on, and begins anew without what was said before: [onRestart] can say so.
     */
    fun answer(text: String, onRestart: () -> Unit, onPiece: (String) -> Unit): Output {
        val config = ConversationConfig(automaticToolCalling = false)
        val current = ChatRuntime { message ->
            val conversation = chat ?: conversation(null, config).also { chat = it }
            send(conversation, message, onPiece)
        }
        val restarted = {
            chat?.close()
            chat = null
            onRestart()
            current
        }
        val replies = Chats.sayOrRestart(current, restarted, text) { NO_TOOL }
        return output(replies.last().text, checkNotNull(chat))
    }

    private fun send(conversation: Conversation, message: ChatMessage, onPiece: (String) -> Unit): ChatReply {
        val done = CountDownLatch(1)
        val text = StringBuilder()
        val calls = mutableListOf<Call>()
        var failure: Throwable? = null
        conversation.sendMessageAsync(
            message.forRuntime(),
            object : MessageCallback {
                override fun onMessage(message: Message) {
                    text.append(message.toString())
                    calls += message.toolCalls.map { Call(it.name, it.arguments) }
                    onPiece(message.toString())
                }

                override fun onDone() = done.countDown()

                override fun onError(throwable: Throwable) {
                    failure = throwable
                    done.countDown()
                }
            },
        )
        done.await()
        failure?.let { throw it }
        return ChatReply(text.toString(), calls)
    }

    /** The message part by part, which the AAR writes as [ChatMessage.toJson] does. */
    private fun ChatMessage.forRuntime(): Message {
        val contents = Contents.of(
            parts.map {
                when (it) {
                    is Part.Text -> Content.Text(it.text)
                    is Part.ToolResponse -> Content.ToolResponse(it.name, it.response)
                }
            },
        )
        return when (role) {
            Role.USER -> Message.user(contents)
            Role.TOOL -> Message.tool(contents)
        }
    }

    override fun close() {
        chat?.close()
        engine.close()
        memory.close()
        acceptanceRate = RuntimeLog.acceptanceRate(log.read())
    }

    override fun notes() = Notes(loadMs, acceptanceRate, memory.bytes, warnings())

    private fun conversation(template: String?, config: ConversationConfig): Conversation {
        ExperimentalFlags.overwritePromptTemplate = template
        return engine.createConversation(config)
    }

    private fun output(text: String, conversation: Conversation): Output {
        val benchmark = conversation.getBenchmarkInfo()
        val speed = benchmark.lastDecodeTokensPerSecond
        val decodeMs = if (speed > 0) 1000.0 * benchmark.lastDecodeTokenCount / speed else 0.0
        return Output(text, benchmark.lastDecodeTokenCount, decodeMs, 1000.0 * benchmark.timeToFirstTokenInSecond)
    }

    private companion object {
        /** The prompt as it is, as the host's reference runtime gets it. */
        const val RAW = "{% for message in messages %}{% if message.content is string %}{{ message.content }}" +
            "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"

        /** The chat declares no tool; a model that calls one all the same gets this. */
        val NO_TOOL = mapOf("error" to "there is no such tool")

        val GREEDY = SamplerConfig(topK = 1, topP = 1.0, temperature = 1.0)
    }
}
