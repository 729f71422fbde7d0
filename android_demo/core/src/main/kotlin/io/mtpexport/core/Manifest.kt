package io.mtpexport.core

import java.io.File
import java.security.MessageDigest

/** A bundle that is damaged, incomplete or of a newer version. */
class BundleException(message: String) : Exception(message)

data class FileEntry(val path: String, val sha256: String, val sizeBytes: Long)

/**
 * The part of a bundle's `manifest.json` that the app needs (docs/format.md). [longestContextLength] is 0 where the
 * context is not chosen.
 */
data class Manifest(
    val model: String,
    val recipe: String,
    val numDraftTokens: Int,
    val contextLength: Int,
    val longestContextLength: Int,
    val container: FileEntry,
) {
    /**
     * The context to open the bundle at, in tokens of prompts and replies together: [chosen], or the bundle's own where it
     * is null. It decides how much memory the caches take. LiteRT-LM would take a context that is too long and shorten it.
     */
    fun context(chosen: Int?): Int {
        if (chosen == null || chosen == contextLength) return contextLength
        if (longestContextLength == 0) {
            throw BundleException("the bundle has a context of $contextLength tokens alone, not of $chosen: leave the choice out")
        }
        if (chosen !in SHORTEST_CONTEXT..longestContextLength) {
            throw BundleException("the context is $chosen, the bundle takes $SHORTEST_CONTEXT to $longestContextLength: choose one of these")
        }
        return chosen
    }

    /** Compare the `.litertlm` in [file] with its size and hash in the manifest. */
    fun check(file: File) {
        if (!file.isFile) throw BundleException("no file at $file: copy ${container.path} there")
        if (file.length() != container.sizeBytes) {
            throw BundleException(
                "$file has ${file.length()} bytes, the manifest says ${container.sizeBytes}: copy it again",
            )
        }
        val digest = sha256(file)
        if (digest != container.sha256) {
            throw BundleException(
                "$file has SHA-256 ${digest.take(16)}…, the manifest says ${container.sha256.take(16)}…: copy it again",
            )
        }
    }

    companion object {
        private val FORMAT_VERSIONS = 1..2

        /** The shortest prefill of a bundle: LiteRT-LM takes no prompt in a context of fewer tokens. */
        const val SHORTEST_CONTEXT = 16

        /** The choice in the [text] of a field, for [context]: null where it is empty, too long for any bundle where it is no Int. */
        fun chosenContext(text: String): Int? = if (text.isEmpty()) null else text.toIntOrNull() ?: Int.MAX_VALUE

        fun parse(text: String): Manifest {
            try {
                val json = Json.parse(text) as? Map<*, *> ?: throw JsonException("a manifest is an object")
                val version = json.needInt("format_version")
                if (version !in FORMAT_VERSIONS) {
                    throw BundleException("the bundle has format version $version, this app reads up to ${FORMAT_VERSIONS.last}: update it")
                }
                val container = json.need<Map<*, *>>("files")["litertlm"] as? Map<*, *>
                    ?: throw BundleException("the bundle has no .litertlm: export it with --format tflite")
                return Manifest(
                    model = json.need("model"),
                    recipe = json.need("recipe"),
                    numDraftTokens = json.needInt("num_draft_tokens"),
                    contextLength = json.needInt("context_length"),
                    longestContextLength = if ("longest_context_length" in json) json.needInt("longest_context_length") else 0,
                    container = FileEntry(
                        safeName(container.need("path")), container.need("sha256"), container.need("size_bytes"),
                    ),
                )
            } catch (error: JsonException) {
                throw BundleException("manifest.json is not valid (${error.message}): export the bundle again")
            }
        }

        /** A manifest is data from anywhere: a name must stay inside its folder. */
        private fun safeName(path: String): String {
            if (path.isEmpty() || path == "." || path == ".." || path.any { it == '/' || it == '\\' || it == '\u0000' }) {
                throw BundleException("manifest.json: the .litertlm has the unsafe path '$path'")
            }
            return path
        }

        private fun sha256(file: File): String {
            val digest = MessageDigest.getInstance("SHA-256")
            file.inputStream().use { input ->
                val piece = ByteArray(1 shl 20)
                while (true) {
                    val count = input.read(piece)
                    if (count < 0) break
                    digest.update(piece, 0, count)
                }
            }
            return digest.digest().joinToString("") { "%02x".format(it) }
        }
    }
}
