package io.mtpexport.core

import java.io.File

/** Whether a bundle fits, and how much memory a run took. */
object Memory {
    private val RESIDENT = Regex("^VmRSS:\\s*(\\d+) kB$", RegexOption.MULTILINE)

    /**
     * Why a container of [sizeBytes] should not be loaded, or null. [availableBytes] is what Android says can be used
     * before it calls memory low, which [reservedBytes] of it is for. Weights are mapped, but every token reads all of
     * them: what does not stay in memory is read again and again, or the app is killed.
     */
    fun problem(sizeBytes: Long, availableBytes: Long, reservedBytes: Long): String? {
        val free = availableBytes - reservedBytes
        if (sizeBytes <= free) return null
        return "the bundle has ${megabytes(sizeBytes)} and ${megabytes(free)} are free before Android ends apps: " +
            "close other apps, or take a smaller recipe"
    }

    /** The resident bytes that a text like Linux's `/proc/self/status` tells. */
    fun resident(status: String): Long = (RESIDENT.find(status)?.groupValues?.get(1)?.toLong() ?: 0) * 1024

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
