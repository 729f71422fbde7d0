package io.mtpexport.core

/** A function that a reply calls. */
data class Call(val name: String, val arguments: Map<String, Any?>)

/** What a tool says to a call. */
data class Answer(val name: String, val response: Any?)

/** What is handed to LiteRT-LM's Conversation: the user's text, or the answers to all calls of a reply, together. */
sealed class ChatMessage {
    data class User(val text: String) : ChatMessage()

    data class Answers(val answers: List<Answer>) : ChatMessage()

    /** The message as LiteRT-LM's C interface takes it. */
    fun toJson(): Map<String, Any?> = when (this) {
        is User -> mapOf("role" to "user", "content" to listOf(mapOf("type" to "text", "text" to text)))
        is Answers -> mapOf(
            "role" to "tool",
            "content" to answers.map { mapOf("type" to "tool_response", "name" to it.name, "response" to it.response) },
        )
    }
}

/** A reply: its text, without a thought, and the functions that it calls. */
data class ChatReply(val text: String, val calls: List<Call>)

/** A conversation that goes on: LiteRT-LM's, or in tests one that was written down. */
fun interface ChatRuntime {
    fun send(message: ChatMessage): ChatReply
}

object Chats {
    /** Answered one after the other before the user goes on, lest a model call for ever. */
    const val MAX_CALLS = 4

    /** Say something and answer what the replies call, until one calls nothing; returns every reply. */
    fun say(runtime: ChatRuntime, text: String, answer: (Call) -> Any?): List<ChatReply> {
        val replies = mutableListOf(runtime.send(ChatMessage.User(text)))
        while (replies.last().calls.isNotEmpty() && replies.size <= MAX_CALLS) {
            val answers = replies.last().calls.map { Answer(it.name, answer(it)) }
            replies += runtime.send(ChatMessage.Answers(answers))
        }
        return replies
    }
}
