package io.mtpexport.core

import java.io.File
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertTrue

/** The files that Python is held against too; `golden` is the system property with their folder. */
private val golden = File(System.getProperty("golden") ?: error("run with -Dgolden=FOLDER of tests/end_to_end/golden"))

private fun lines(name: String) = File(golden, name).readLines().map { Json.parse(it) as Map<*, *> }

private fun Map<*, *>.doubles(key: String) = need<List<*>>(key).map { (it as Number).toDouble() }

private fun Map<*, *>.ints(key: String) = need<List<*>>(key).map { (it as Number).toInt() }

private fun Map<*, *>.strings(key: String) = need<List<*>>(key).map { it as String }

class GoldenTest {
    @Test
    fun `the near-tie rule judges as Python's does`() {
        val cases = lines("parity_cases.jsonl")
        assertTrue(cases.size >= 10)
        for (case in cases) {
            val name = case.need<String>("name")
            val margins = case.doubles("margins")
            val tolerance = case.needDouble("tolerance")
            val text = case["text"] as String?
            val comparison = if (text != null) {
                Parity.compareText(name, case.strings("pieces"), text, margins, tolerance)
            } else {
                Parity.compareTokens(
                    name, case.ints("reference"), case.ints("tokens"), margins, tolerance, case.needInt("max_new_tokens"),
                )
            }
            val expected = case.need<Map<*, *>>("expected")
            assertEquals(expected.needInt("agreed"), comparison.agreed, name)
            assertEquals(expected.needInt("compared"), comparison.compared, name)
            assertEquals((expected["first_difference"] as Long?)?.toInt(), comparison.firstDifference, name)
            assertEquals((expected["margin"] as Number?)?.toDouble(), comparison.margin, name)
            assertEquals(expected.need<String>("verdict"), comparison.verdict.name.lowercase(), name)
        }
    }

    @Test
    fun `the runtime's log is read as Python reads it`() {
        val cases = lines("runtime_log.jsonl")
        for (case in cases) {
            val log = case.need<String>("line")
            assertEquals((case["acceptance_rate"] as Number?)?.toDouble(), RuntimeLog.acceptanceRate(log), log)
            assertEquals(case.strings("warnings"), RuntimeLog.warnings(log), log)
        }
        val all = cases.joinToString("\n") { it.need<String>("line") }
        assertEquals(cases.flatMap { it.strings("warnings") }, RuntimeLog.warnings(all + "\n" + all))
        assertEquals(0.558642, RuntimeLog.acceptanceRate(all))
    }

    @Test
    fun `nano writes the same with MTP as without`() {
        val traces = lines("traces.jsonl").groupBy { it["recipe"] to it["prompt"] }
        val prompts = Prompt.parseLines(File(golden, "prompts.jsonl").readText())
        assertEquals(traces.keys.map { it.second }.toSet(), prompts.map { it.id }.toSet<Any?>())
        for ((key, pair) in traces) {
            val (plain, drafted) = pair.sortedBy { it.needInt("num_draft_tokens") }
            val comparison = Parity.compareTokens(
                key.toString(), plain.ints("tokens"), drafted.ints("tokens"), plain.doubles("margins"), 0.05, 24,
            )
            assertEquals(Verdict.EQUAL, comparison.verdict, comparison.toString())
            val text = drafted.strings("pieces").joinToString("")
            val asText = Parity.compareText(key.toString(), plain.strings("pieces"), text, plain.doubles("margins"), 0.05)
            assertEquals(Verdict.EQUAL, asText.verdict, asText.toString())
            assertTrue("accepted" in drafted.strings("origins"))
        }
    }

    @Test
    fun `a chat hands Conversation the messages that Python hands it`() {
        val chats = lines("chats.jsonl")
        assertTrue(chats.size >= 3)
        for (chat in chats) {
            val turns = chat.need<List<*>>("turns").map { it as Map<*, *> }
            val messages = mutableListOf<Any?>()
            val runtime = ChatRuntime { message ->
                messages += Json.parse(Json.write(message.toJson()))
                reply(turns[messages.size - 1].need("reply"))
            }
            val answers = chat.need<Map<*, *>>("answers")
            val replies = chat.strings("says").flatMap { text -> Chats.say(runtime, text) { answers[it.name] } }
            assertEquals(turns.map { it["message"] }, messages, chat.need<String>("name"))
            assertEquals(turns.size, replies.size)
        }
        assertTrue(chats.any { chat -> "tool_response" in Json.write(chat) })
    }

    @Test
    fun `a tool that returns nothing answers with an empty map`() {
        val message = ChatMessage.answers(listOf(Call("beep", emptyMap()) to null))
        assertEquals(listOf<Part>(Part.ToolResponse("beep", emptyMap<String, Any?>())), message.parts)
        assertEquals(
            """{"role":"tool","content":[{"type":"tool_response","name":"beep","response":{}}]}""",
            Json.write(message.toJson()),
        )
    }

    private fun reply(json: Map<*, *>): ChatReply {
        val parts = (json["content"] as List<*>? ?: emptyList<Any?>()).map { it as Map<*, *> }
        val calls = (json["tool_calls"] as List<*>? ?: emptyList<Any?>()).map { (it as Map<*, *>).need<Map<*, *>>("function") }
        @Suppress("UNCHECKED_CAST")
        return ChatReply(
            parts.joinToString("") { it["text"] as String? ?: "" },
            calls.map { Call(it.need("name"), it.need<Map<*, *>>("arguments") as Map<String, Any?>) },
        )
    }

    @Test
    fun `a model that calls for ever is left after some calls`() {
        var sent = 0
        val replies = Chats.say({ sent++; ChatReply("", listOf(Call("again", emptyMap()))) }, "go") { null }
        assertEquals(1 + Chats.MAX_CALLS, sent)
        assertEquals(sent, replies.size)
    }

    @Test
    fun `an empty reply begins a new conversation`() {
        val sent = mutableListOf<String>()
        val full = ChatRuntime { message -> ChatReply("", emptyList()).also { sent += "full: $message" } }
        val fresh = ChatRuntime { message -> ChatReply("Yes.", emptyList()).also { sent += "fresh: $message" } }
        val message = ChatMessage.user("Well?")
        assertEquals("Yes.", Chats.sayOrRestart(full, { fresh }, "Well?") { null }.single().text)
        assertEquals(listOf("full: $message", "fresh: $message"), sent)
        assertEquals("Yes.", Chats.sayOrRestart(fresh, { full }, "Well?") { null }.single().text)
        assertEquals(3, sent.size)
    }
}
