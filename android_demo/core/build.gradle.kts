plugins {
    alias(libs.plugins.kotlin.jvm)
}

kotlin {
    jvmToolchain(17)
}

dependencies {
    testImplementation(libs.kotlin.test.junit)
}

tasks.test {
    systemProperty("golden", rootDir.resolve("../tests/end_to_end/golden").path)
    systemProperty("report", layout.buildDirectory.file("report.json").get().asFile.path)
}
