package io.mtpexport.core

/** A function that a reply calls. */
data class Call(val name: String, val arguments: Map<String, Any?>)

/** A part of a message: the user's text, or the answer of a tool, which LiteRT-LM takes as any value but null. */
sealed class Part {
    data class Text(val text: String) : Part()

    data class ToolResponse(val name: String, val response: Any) : Part()
}

enum class Role(val word: String) { USER("user"), TOOL("tool") }

/** A message to LiteRT-LM's Conversation: the user's text, or the answers to all calls of a reply, together. */
data class ChatMessage(val role: Role, val parts: List<Part>) {
    /** The message as LiteRT-LM's C interface takes it. */
    fun toJson(): Map<String, Any> = mapOf("role" to role.word, "content" to parts.map(::json))

    private fun json(part: Part): Map<String, Any> = when (part) {
        is Part.Text -> mapOf("type" to "text", "text" to part.text)
        is Part.ToolResponse -> mapOf("type" to "tool_response", "name" to part.name, "response" to part.response)
    }

    companion object {
        fun user(text: String) = ChatMessage(Role.USER, listOf(Part.Text(text)))

        /** The answers by their calls; a tool that returns nothing answers with an empty map. */
        fun answers(answers: List<Pair<Call, Any?>>) = ChatMessage(
            Role.TOOL, answers.map { (call, response) -> Part.ToolResponse(call.name, response ?: emptyMap<String, Any?>()) },
        )
    }
}

/** A reply: its text, without a thought, and the functions that it calls. */
data class ChatReply(val text: String, val calls: List<Call>) {
    val isEmpty: Boolean get() = text.isEmpty() && calls.isEmpty()
}

/** A conversation that goes on: LiteRT-LM's, or in tests one that was written down. */
fun interface ChatRuntime {
    fun send(message: ChatMessage): ChatReply
}

object Chats {
    /** Replies with calls that are answered before the user goes on; a model could call for ever. */
    const val MAX_CALLS = 4

    /** Send a text and answer the calls of the replies until one calls nothing; return every reply. */
    fun say(runtime: ChatRuntime, text: String, answer: (Call) -> Any?): List<ChatReply> {
        val replies = mutableListOf(runtime.send(ChatMessage.user(text)))
        while (replies.last().calls.isNotEmpty() && replies.size <= MAX_CALLS) {
            replies += runtime.send(ChatMessage.answers(replies.last().calls.map { it to answer(it) }))
        }
        return replies
    }

    /**
     * As [say], in the conversation that goes on. Where the reply is empty it cannot go on: its context is full, or it was
     * taken back further than sliding layers keep (docs/litert-lm.md). [restarted] begins another, which gets the text.
     */
    fun sayOrRestart(
        runtime: ChatRuntime,
        restarted: () -> ChatRuntime,
        text: String,
        answer: (Call) -> Any?,
    ): List<ChatReply> {
        val replies = say(runtime, text, answer)
        return if (replies.last().isEmpty) say(restarted(), text, answer) else replies
    }
}
