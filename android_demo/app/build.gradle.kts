plugins {
    alias(libs.plugins.android.application)
    alias(libs.plugins.kotlin.android)
}

android {
    namespace = "io.mtpexport.app"
    compileSdk = 36

    defaultConfig {
        applicationId = "io.mtpexport.demo"
        minSdk = 26
        targetSdk = 34 // from 35 on an app is drawn under the bars of the system
        versionCode = 1
        versionName = "0.1.0"
        testInstrumentationRunner = "io.mtpexport.app.LiteRtLmTest"
        ndk { abiFilters += "arm64-v8a" }
    }

    // The prompts that mtp-export measures with.
    sourceSets["main"].assets.srcDir(rootDir.resolve("../converter/mtp_export/check/prompt_sets"))
}

kotlin {
    jvmToolchain(17)
}

dependencies {
    implementation(project(":core"))
    implementation(libs.litertlm.android)
}
