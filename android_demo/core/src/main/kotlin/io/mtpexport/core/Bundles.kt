package io.mtpexport.core

import java.io.File
import java.io.IOException
import java.io.InputStream
import java.io.OutputStream

/** A bundle's folder on the phone: `manifest.json` and the `.litertlm` that it names. */
data class Bundle(val folder: File, val manifest: Manifest) {
    val container: File get() = File(folder, manifest.container.path)

    /** The name in a list. */
    val title: String get() = "${manifest.model}, ${manifest.recipe} (${folder.name})"
}

object Bundles {
    const val MANIFEST = "manifest.json"

    /** List the bundles in the folders of [root], and the problems of the folders that hold none. */
    fun list(root: File): Pair<List<Bundle>, List<String>> {
        val problems = mutableListOf<String>()
        val bundles = root.listFiles().orEmpty().filter { File(it, MANIFEST).isFile }.sorted().mapNotNull { folder ->
            try {
                open(folder)
            } catch (error: BundleException) {
                problems += "${folder.name}: ${error.message}"
                null
            }
        }
        return bundles to problems
    }

    fun open(folder: File): Bundle {
        val manifest = File(folder, MANIFEST)
        if (!manifest.isFile) throw BundleException("$folder has no $MANIFEST: choose it together with the .litertlm")
        return Bundle(folder, Manifest.parse(manifest.readText()))
    }

    /** Copy the chosen [files], contents by name, into a folder of [root], and check them by their manifest. */
    fun import(root: File, files: Map<String, () -> InputStream>): Bundle {
        val manifest = Manifest.parse(
            (files[MANIFEST] ?: throw BundleException("choose the bundle's $MANIFEST and its .litertlm together"))()
                .use { it.readBytes().decodeToString() },
        )
        val name = manifest.container.path
        val container = files[name] ?: throw BundleException("$MANIFEST names $name, and ${files.keys} were chosen: choose both")
        val folder = File(root, name.removeSuffix(".litertlm")).apply { mkdirs() }
        write(File(folder, name)) { out -> container().use { it.copyTo(out) } }
        try {
            manifest.check(File(folder, name))
        } catch (error: BundleException) {
            File(folder, name).delete()
            throw error
        }
        write(File(folder, MANIFEST)) { out -> files.getValue(MANIFEST)().use { it.copyTo(out) } }
        return Bundle(folder, manifest)
    }

    /** Write a file beside its place and rename it, so that no reader sees half of it. */
    fun write(file: File, fill: (OutputStream) -> Unit) {
        val part = File(file.path + ".part")
        try {
            part.outputStream().use(fill)
            if (!part.renameTo(file)) throw IOException("$file cannot be written: is its folder there and its disk not full?")
        } finally {
            part.delete()
        }
    }
}
