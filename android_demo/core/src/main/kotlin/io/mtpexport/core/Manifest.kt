package io.mtpexport.core

import java.io.File
import java.security.MessageDigest

/** A bundle that is damaged, incomplete or of a newer version. */
class BundleException(message: String) : Exception(message)

data class FileEntry(val path: String, val sha256: String, val sizeBytes: Long)

/** The part of a bundle's `manifest.json` that the app needs (docs/format.md). */
data class Manifest(
    val model: String,
    val recipe: String,
    val numDraftTokens: Int,
    val contextLength: Int,
    val container: FileEntry,
) {
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
        private const val FORMAT_VERSION = 1

        fun parse(text: String): Manifest {
            try {
                val json = Json.parse(text) as? Map<*, *> ?: throw JsonException("a manifest is an object")
                val version = json.needInt("format_version")
                if (version != FORMAT_VERSION) {
                    throw BundleException("the bundle has format version $version, this app reads $FORMAT_VERSION: update it")
                }
                val container = json.need<Map<*, *>>("files")["litertlm"] as? Map<*, *>
                    ?: throw BundleException("the bundle has no .litertlm: export it with --format tflite")
                return Manifest(
                    model = json.need("model"),
                    recipe = json.need("recipe"),
                    numDraftTokens = json.needInt("num_draft_tokens"),
                    contextLength = json.needInt("context_length"),
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
