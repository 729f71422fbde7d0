package io.mtpexport.core

import java.io.File
import java.nio.file.Files
import java.security.MessageDigest
import kotlin.test.AfterTest
import kotlin.test.Test
import kotlin.test.assertEquals
import kotlin.test.assertFailsWith
import kotlin.test.assertTrue

class JsonTest {
    @Test
    fun `values survive writing and reading`() {
        val value = linkedMapOf(
            "text" to "a\"\\\n\u0001ä😀", "whole" to 5L, "real" to -0.25, "yes" to true, "nothing" to null,
            "list" to listOf(1L, emptyList<Any?>(), emptyMap<String, Any?>()),
        )
        assertEquals<Any?>(value, Json.parse(Json.write(value)))
        assertEquals<Any?>("é/", Json.parse(" \"\\u00e9\\/\" "))
        assertEquals<Any?>(1500.0, Json.parse("1.5e3"))
    }

    @Test
    fun `text that is no JSON is refused with its place`() {
        val wrong = listOf("", "{", "[1,]", "{\"a\" 1}", "01", "nul", "\"\\x\"", "\"\n\"", "1 2", "\"\\u12", "[".repeat(1000))
        for (text in wrong) {
            val error = assertFailsWith<JsonException>(text.take(10)) { Json.parse(text) }
            assertTrue(error.message!!.startsWith("JSON, character "), error.message)
        }
        assertFailsWith<JsonException> { Json.write(Double.NaN) }
    }
}

class ManifestTest {
    private val file = File.createTempFile("mtp", ".litertlm").apply { deleteOnExit(); writeText("container") }
    private val sha = "4ed3bd90a5d9e4fdbd1a62c2d9ce6ae2cda33e3c6bf4a2a4aa37b73ca0d0b8ad"

    private fun manifest(path: String = "nano.litertlm", version: Int = 2, hash: String = sha, size: Long = 9) =
        Json.write(
            mapOf(
                "format_version" to version, "model" to "nano", "recipe" to "int8", "num_draft_tokens" to 4,
                "context_length" to 1024, "longest_context_length" to 4096,
                "files" to mapOf("litertlm" to mapOf("path" to path, "sha256" to hash, "size_bytes" to size)),
            ),
        )

    @Test
    fun `a manifest is read`() {
        val parsed = Manifest.parse(manifest())
        assertEquals(Manifest("nano", "int8", 4, 1024, 4096, FileEntry("nano.litertlm", sha, 9)), parsed)
    }

    @Test
    fun `a wrong manifest is refused and says why`() {
        for (path in listOf("../x", "a/b", "", "..", "a\\b")) {
            assertTrue("unsafe" in assertFailsWith<BundleException> { Manifest.parse(manifest(path)) }.message!!)
        }
        assertTrue("version 3" in assertFailsWith<BundleException> { Manifest.parse(manifest(version = 3)) }.message!!)
        assertTrue("not valid" in assertFailsWith<BundleException> { Manifest.parse("[]") }.message!!)
        assertTrue("model is null" in assertFailsWith<BundleException> { Manifest.parse("{\"format_version\": 1, \"files\": {\"litertlm\": {}}}") }.message!!)
        assertTrue("--format tflite" in assertFailsWith<BundleException> { Manifest.parse("{\"format_version\": 1, \"files\": {}}") }.message!!)
    }

    @Test
    fun `a context is chosen within what the bundle takes`() {
        val chosen = Manifest.parse(manifest())
        assertEquals(listOf(1024, 2000, 4096), listOf(null, 2000, 4096).map(chosen::context))
        assertEquals(16, chosen.context(16))
        for (wrong in listOf(0, 15, 4097)) {
            assertTrue("takes 16 to 4096" in assertFailsWith<BundleException> { chosen.context(wrong) }.message!!)
        }
        val fixed = chosen.copy(longestContextLength = 0)
        assertEquals(listOf(1024, 1024), listOf(null, 1024).map(fixed::context))
        assertTrue("1024 tokens alone" in assertFailsWith<BundleException> { fixed.context(512) }.message!!)
    }

    @Test
    fun `a field that is not empty never stands for the bundle's own context`() {
        assertEquals(listOf(null, 2000), listOf("", "2000").map(Manifest::chosenContext))
        for (text in listOf("2147483648", "99999999999999999999", "x")) {
            val chosen = Manifest.chosenContext(text)
            assertFailsWith<BundleException>(text) { Manifest.parse(manifest()).context(chosen) }
        }
    }

    @Test
    fun `a file is held against size and hash`() {
        val digest = MessageDigest.getInstance("SHA-256").digest("container".toByteArray())
        val right = digest.joinToString("") { "%02x".format(it) }
        Manifest.parse(manifest(hash = right)).check(file)
        assertTrue("SHA-256" in assertFailsWith<BundleException> { Manifest.parse(manifest()).check(file) }.message!!)
        assertTrue("9 bytes" in assertFailsWith<BundleException> { Manifest.parse(manifest(size = 8)).check(file) }.message!!)
        assertFailsWith<BundleException> { Manifest.parse(manifest()).check(File("absent")) }
    }
}

class BundlesTest {
    private val root = Files.createTempDirectory("mtp").toFile()
    private val digest = MessageDigest.getInstance("SHA-256").digest("container".toByteArray())
    private val manifest = Json.write(
        mapOf(
            "format_version" to 1, "model" to "nano", "recipe" to "int8", "num_draft_tokens" to 4, "context_length" to 1020,
            "files" to mapOf(
                "litertlm" to mapOf(
                    "path" to "n.litertlm", "sha256" to digest.joinToString("") { "%02x".format(it) }, "size_bytes" to 9,
                ),
            ),
        ),
    )

    private fun files(container: String, name: String = "n.litertlm") =
        mapOf("manifest.json" to { manifest.byteInputStream() }, name to { container.byteInputStream() })

    @AfterTest
    fun remove() {
        root.deleteRecursively()
    }

    @Test
    fun `chosen files are checked and then listed`() {
        val bundle = Bundles.import(root, files("container"))
        assertEquals(File(root, "n/n.litertlm"), bundle.container)
        assertEquals("container", bundle.container.readText())
        File(root, "broken").mkdirs()
        File(root, "broken/manifest.json").writeText("{}")
        val (bundles, problems) = Bundles.list(root)
        assertEquals(listOf(bundle), bundles)
        assertTrue(problems.single().startsWith("broken: manifest.json is not valid"), problems.toString())
    }

    @Test
    fun `a wrong choice leaves nothing that could be loaded`() {
        val damaged = assertFailsWith<BundleException> { Bundles.import(root, files("c0ntainer")) }
        assertTrue("SHA-256" in damaged.message!!)
        val other = assertFailsWith<BundleException> { Bundles.import(root, files("container", "x.litertlm")) }
        assertTrue("names n.litertlm" in other.message!!)
        assertFailsWith<BundleException> { Bundles.import(root, emptyMap()) }
        assertEquals(emptyList(), root.walk().filter { it.isFile }.toList())
    }
}

class MemoryTest {
    @Test
    fun `reserved memory is not free`() {
        assertEquals(null, Memory.problem(100, 133, 50))
        assertTrue(Memory.problem(100, 132, 50) != null)
        val problem = Memory.problem(3_000_000_000, 2_500_000_000, 500_000_000)!!
        assertTrue("2490 MB" in problem && "2000 MB are free" in problem, problem)
    }

    @Test
    fun `the peak outlives the allocation`() {
        val memory = PeakMemory()
        val before = memory.bytes
        assertTrue(before > 1_000_000, "$before")
        var block: ByteArray? = ByteArray(200_000_000) { 1 }
        Thread.sleep(500)
        block = block?.let { null }
        memory.close()
        assertTrue(memory.bytes > before + 150_000_000, "${memory.bytes} after $before")
    }
}

class RunTest {
    private val prompts = listOf(Prompt("c", "code", "x"), Prompt("p", "prose", "y"))
    private val log = mutableListOf<String>()

    /** Twice as fast with MTP on code, as fast on prose; commits two tokens too many with MTP, as LiteRT-LM does. */
    private fun open(useMtp: Boolean) = object : Generator {
        override fun generate(prompt: String, maxNewTokens: Int): Output {
            log += "$prompt $maxNewTokens $useMtp"
            val speed = if (useMtp && prompt == "x") 2 else 1
            val text = "t".repeat(if (useMtp) maxNewTokens + 2 else maxNewTokens)
            return Output(text, text.length, 10.0 * text.length / speed, 5.0)
        }

        override fun close() {
            log += "closed $useMtp"
        }

        override fun notes(): Notes {
            check(log.last() == "closed $useMtp")
            return Notes(9.0, if (useMtp) 0.5 else null, 1000, listOf("w"))
        }
    }

    @Test
    fun `a variant is warmed up, run and closed before the next is opened`() {
        RunProtocol(prompts, 20, 2, ::open).run()
        val expected = listOf(false, true).flatMap { mtp ->
            listOf("x 8 $mtp", "x 20 $mtp", "x 20 $mtp", "y 20 $mtp", "y 20 $mtp", "closed $mtp")
        }
        assertEquals(expected, log)
    }

    @Test
    fun `the report tells the gain by kind of text`() {
        val request = Request.parse(File(System.getProperty("golden"), "app_request.json").readText())
        assertEquals(listOf("code", "prose"), request.prompts.map { it.kind })
        assertEquals(1024, request.contextLength)
        val runs = RunProtocol(request.prompts, request.maxNewTokens, request.repetitions, ::open).run()
        val phone = Phone("arm64-v8a", "c", "s", mapOf("android" to "16"))
        val manifest = Manifest("nano", "int8", 4, 1020, 0, FileEntry("n.litertlm", "00", 1))
        val report = Report.build(phone, manifest, request, runs)
        val gains = report.need<List<*>>("speed").associate { (it as Map<*, *>)["kind"] to it.needDouble("mtp_gain") }
        assertEquals(2.0, gains["code"]!!, 1e-9)
        assertEquals(1.0, gains["prose"]!!, 1e-9)
        assertEquals(4.0 / 3, gains["all"]!!, 1e-9)
        assertTrue(report.need<List<*>>("prompts").all { (it as Map<*, *>)["same_text"] == true })
        assertTrue(!Report.sameText("abc", "abd"))
        // For Python, which reads it as it reads a phone's.
        File(System.getProperty("report")).writeText(Json.write(report))
    }

    @Test
    fun `prompts of all kinds in turn`() {
        val many = listOf("code", "code", "prose", "code").mapIndexed { i, kind -> Prompt("$i", kind, "t") }
        assertEquals(listOf("0", "2", "1"), Prompt.inTurn(many, 3).map { it.id })
    }

    @Test
    fun `medians`() {
        assertEquals(2.0, Statistics.median(listOf(3.0, 1.0, 2.0)))
        assertEquals(2.5, Statistics.median(listOf(4.0, 1.0, 2.0, 3.0)))
        assertFailsWith<IllegalArgumentException> { Statistics.median(emptyList()) }
    }
}
