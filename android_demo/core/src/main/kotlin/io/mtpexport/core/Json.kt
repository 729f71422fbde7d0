package io.mtpexport.core

/** A text is no JSON, or not the JSON that was expected. */
class JsonException(message: String) : Exception(message)

/**
 * JSON values as Kotlin's own: `Map`, `List`, `String`, `Double`, `Long`, `Boolean` and null. Small enough to read in
 * one sitting, because neither org.json (Android's, absent on the JVM) nor a library is to be had in both places.
 */
object Json {
    fun parse(text: String): Any? = Parser(text).document()

    fun write(value: Any?): String = StringBuilder().also { append(it, value) }.toString()

    private fun append(out: StringBuilder, value: Any?) {
        when (value) {
            null -> out.append("null")
            is String -> appendString(out, value)
            is Double -> out.append(if (value.isFinite()) value.toString() else throw JsonException("$value is no JSON number"))
            is Number, is Boolean -> out.append(value.toString())
            is Map<*, *> -> {
                out.append('{')
                value.entries.forEachIndexed { i, (key, item) ->
                    if (i > 0) out.append(',')
                    appendString(out, key as String)
                    out.append(':')
                    append(out, item)
                }
                out.append('}')
            }
            is Iterable<*> -> {
                out.append('[')
                value.forEachIndexed { i, item ->
                    if (i > 0) out.append(',')
                    append(out, item)
                }
                out.append(']')
            }
            else -> throw JsonException("cannot write a ${value::class.simpleName} as JSON")
        }
    }

    private fun appendString(out: StringBuilder, text: String) {
        out.append('"')
        for (c in text) {
            when {
                c == '"' || c == '\\' -> out.append('\\').append(c)
                c < ' ' -> out.append("\\u%04x".format(c.code))
                else -> out.append(c)
            }
        }
        out.append('"')
    }

    private class Parser(private val text: String) {
        private var at = 0
        private var depth = 0

        fun document(): Any? {
            val value = value()
            space()
            if (at != text.length) fail("text after the end")
            return value
        }

        private fun value(): Any? {
            space()
            if (++depth > MAX_DEPTH) fail("nested too deeply")
            val value: Any? = when (peek()) {
                '{' -> map()
                '[' -> list()
                '"' -> string()
                't' -> word("true", true)
                'f' -> word("false", false)
                'n' -> word("null", null)
                else -> number()
            }
            depth--
            return value
        }

        private fun map(): Map<String, Any?> {
            val entries = LinkedHashMap<String, Any?>()
            items('}') {
                space()
                if (peek() != '"') fail("a key is expected")
                val key = string()
                space()
                take(':')
                entries[key] = value()
            }
            return entries
        }

        private fun list(): List<Any?> = ArrayList<Any?>().also { values -> items(']') { values.add(value()) } }

        private fun items(end: Char, item: () -> Unit) {
            at++
            space()
            if (peek() == end) { at++; return }
            while (true) {
                item()
                space()
                if (peek() == end) { at++; return }
                take(',')
            }
        }

        private fun string(): String {
            at++
            val out = StringBuilder()
            while (true) {
                when (val c = next()) {
                    '"' -> return out.toString()
                    '\\' -> out.append(escaped())
                    else -> if (c < ' ') fail("a control character in a string") else out.append(c)
                }
            }
        }

        private fun escaped(): Char = when (val c = next()) {
            '"', '\\', '/' -> c
            'b' -> '\b'
            'f' -> '\u000c'
            'n' -> '\n'
            'r' -> '\r'
            't' -> '\t'
            'u' -> {
                if (at + 4 > text.length) fail("the text ends in an escape")
                val digits = text.substring(at, at + 4)
                at += 4
                (digits.toIntOrNull(16) ?: fail("\\u$digits is no escape")).toChar()
            }
            else -> fail("\\$c is no escape")
        }

        private fun number(): Number {
            val match = NUMBER.matchAt(text, at) ?: fail("a value is expected")
            at += match.value.length
            return match.value.toLongOrNull() ?: match.value.toDouble()
        }

        private fun <T> word(word: String, value: T): T {
            if (!text.startsWith(word, at)) fail("a value is expected")
            at += word.length
            return value
        }

        private fun space() {
            while (at < text.length && text[at] in " \t\r\n") at++
        }

        private fun peek(): Char = if (at < text.length) text[at] else fail("the text ends too early")

        private fun next(): Char = peek().also { at++ }

        private fun take(c: Char) {
            if (next() != c) fail("'$c' is expected")
        }

        private fun fail(problem: String): Nothing = throw JsonException("JSON, character $at: $problem")
    }

    private const val MAX_DEPTH = 200
    private val NUMBER = Regex("-?(0|[1-9][0-9]*)(\\.[0-9]+)?([eE][+-]?[0-9]+)?")
}

/** The value of a key, of the type that is expected there. */
inline fun <reified T> Map<*, *>.need(key: String): T {
    val value = this[key]
    return value as? T ?: throw JsonException("$key is ${Json.write(value)}, expected a ${T::class.simpleName}")
}

fun Map<*, *>.needDouble(key: String): Double = need<Number>(key).toDouble()

fun Map<*, *>.needInt(key: String): Int = need<Long>(key).toInt()
