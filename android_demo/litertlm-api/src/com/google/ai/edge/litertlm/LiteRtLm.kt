/**
 * The signatures of LiteRT-LM's Kotlin API that the app calls, as far as it calls them, so that the app can be
 * type-checked where the AAR cannot be fetched. No behaviour, in no APK, and no part of the Gradle build, which takes
 * the real `com.google.ai.edge.litertlm:litertlm-android`.
 */
@file:Suppress("UNUSED_PARAMETER")

package com.google.ai.edge.litertlm

@RequiresOptIn(level = RequiresOptIn.Level.ERROR)
@Retention(AnnotationRetention.BINARY)
@Target(AnnotationTarget.CLASS, AnnotationTarget.FUNCTION)
annotation class ExperimentalApi

@ExperimentalApi
object ExperimentalFlags {
    var enableBenchmark: Boolean
        get() = signatureOnly()
        set(value) = signatureOnly()
    var enableSpeculativeDecoding: Boolean?
        get() = signatureOnly()
        set(value) = signatureOnly()
    var overwritePromptTemplate: String?
        get() = signatureOnly()
        set(value) = signatureOnly()
}

sealed class Backend {
    class CPU(val threadCount: Int? = null) : Backend()
    class GPU : Backend()
}

class EngineConfig(
    val modelPath: String,
    val backend: Backend = signatureOnly(),
    val visionBackend: Backend? = null,
    val audioBackend: Backend? = null,
    val maxNumTokens: Int? = null,
    val maxNumImages: Int? = null,
    val cacheDir: String? = null,
)

class SamplerConfig(val topK: Int, val topP: Double, val temperature: Double, val seed: Int = 0)

class ConversationConfig(
    val samplerConfig: SamplerConfig? = null,
    val automaticToolCalling: Boolean = true,
    val maxOutputToken: Int? = null,
)

class Engine(val engineConfig: EngineConfig) : AutoCloseable {
    fun initialize(): Unit = signatureOnly()
    fun createConversation(conversationConfig: ConversationConfig = signatureOnly()): Conversation = signatureOnly()
    override fun close(): Unit = signatureOnly()

    companion object {
        fun setNativeMinLogSeverity(level: LogSeverity): Unit = signatureOnly()
    }
}

class LiteRtLmJniException(message: String) : RuntimeException(message)

enum class LogSeverity { INFO }

abstract class Conversation : AutoCloseable {
    abstract fun sendMessage(text: String): Message
    abstract fun sendMessageAsync(message: Message, callback: MessageCallback)
    abstract fun cancelProcess()

    @ExperimentalApi
    abstract fun getBenchmarkInfo(): BenchmarkInfo
}

interface MessageCallback {
    fun onMessage(message: Message)
    fun onDone()
    fun onError(throwable: Throwable)
}

/** Its `toString` is the text of its contents. */
class Message private constructor() {
    val toolCalls: List<ToolCall>
        get() = signatureOnly()

    companion object {
        fun user(contents: Contents): Message = signatureOnly()
        fun tool(contents: Contents): Message = signatureOnly()
    }
}

class ToolCall(val name: String, val arguments: Map<String, Any?>)

class Contents private constructor() {
    companion object {
        fun of(contents: List<Content>): Contents = signatureOnly()
    }
}

sealed class Content {
    class Text(val text: String) : Content()

    class ToolResponse(val name: String, val response: Any) : Content()
}

class BenchmarkInfo(
    val initTimeInSecond: Double,
    val timeToFirstTokenInSecond: Double,
    val lastDecodeTokenCount: Int,
    val lastDecodeTokensPerSecond: Double,
)

class Capabilities(modelPath: String) : AutoCloseable {
    fun hasSpeculativeDecodingSupport(): Boolean = signatureOnly()
    override fun close(): Unit = signatureOnly()
}

private fun signatureOnly(): Nothing = throw NotImplementedError("a signature without behaviour")
