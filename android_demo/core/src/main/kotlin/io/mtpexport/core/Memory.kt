package io.mtpexport.core

import java.io.File

/** Whether a bundle fits, and how much memory a run took. */
object Memory {
    private val RESIDENT = Regex("^VmRSS:\\s*(\\d+) kB$", RegexOption.MULTILINE)

    /**
     * The reason why a container of [sizeBytes] should not be loaded, or null. [availableBytes] is free by Android's count;
     * below [reservedBytes] it ends apps. Weights are mapped, but every token reads nearly all of them.
     */
    fun problem(sizeBytes: Long, availableBytes: Long, reservedBytes: Long): String? {
        val needed = sizeBytes * NEEDED_PERCENT / 100
        val free = availableBytes - reservedBytes
        if (needed <= free) return null
        return "the bundle takes ${megabytes(needed)} and ${megabytes(free)} are free before Android ends apps: " +
            "close other apps, or take a smaller recipe"
    }

    /** The resident bytes in a text like Linux's `/proc/self/status`. */
    fun resident(status: String): Long = (RESIDENT.find(status)?.groupValues?.get(1)?.toLong() ?: 0) * 1024

    // E2B at int4: 2.55 GB in the reference runtime, of 3.08 GB (benchmarks/results/real_size_e2b_tflite_int4.json).
    private const val NEEDED_PERCENT = 83

    private fun megabytes(bytes: Long) = "${maxOf(0, bytes) / 1_000_000} MB"
}

/** The most memory that this process had, looked at ten times a second until it is closed. */
class PeakMemory(private val status: File = File("/proc/self/status")) : AutoCloseable {
    @Volatile
    var bytes = Memory.resident(status.readText())
        private set
    private val thread = Thread {
        try {
            while (true) {
                look()
                Thread.sleep(100)
            }
        } catch (_: InterruptedException) {
            // closed
        }
    }.apply { isDaemon = true; start() }

    override fun close() {
        thread.interrupt()
        thread.join()
        look()
    }

    private fun look() {
        bytes = maxOf(bytes, Memory.resident(status.readText()))
    }
}
