package io.mtpexport.app

import android.app.ActivityManager
import android.content.Context
import android.os.Build
import android.os.Process
import io.mtpexport.core.Bundle
import io.mtpexport.core.Memory
import io.mtpexport.core.Phone
import java.io.File
import java.text.SimpleDateFormat
import java.util.Date
import java.util.Locale

/** The folder that `mtp-export device` writes to and reads from. */
fun Context.files(): File = getExternalFilesDir(null) ?: filesDir

fun Context.bundles(): File = File(files(), "bundles").apply { mkdirs() }

/** LiteRT-LM's packed weights and compiled kernels. */
fun Context.runtimeCache(): File = File(cacheDir, "litertlm")

/** The reason why a bundle should not be loaded now, or null. */
fun Context.memoryProblem(bundle: Bundle): String? {
    val memory = ActivityManager.MemoryInfo()
    (getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager).getMemoryInfo(memory)
    return Memory.problem(bundle.manifest.container.sizeBytes, memory.availMem, memory.threshold)
}

fun phone() = Phone(
    machine = Build.SUPPORTED_ABIS.first(),
    cpu = Build.HARDWARE,
    system = "${Build.MANUFACTURER} ${Build.MODEL}, Android ${Build.VERSION.RELEASE}",
    versions = mapOf("android" to Build.VERSION.RELEASE, "build" to Build.DISPLAY),
)

/** The log of this process since this object was made; an app sees its own lines only. */
class OwnLog {
    private val since = SimpleDateFormat("MM-dd HH:mm:ss.SSS", Locale.US).format(Date())

    fun read(): String {
        val command = arrayOf("logcat", "-d", "-v", "raw", "--pid=${Process.myPid()}", "-T", since)
        val logcat = Runtime.getRuntime().exec(command)
        return logcat.inputStream.bufferedReader().use { it.readText() }
    }
}
