//! How is the image linked? As a static, position-dependent program of its own, from `image.ld`,
//! with none of the C runtime.
//!
//! Host and image share one target triple, so that the image is told from a host check by its own
//! code-generation flags: only the image build asks for the static relocation model.

fn main() {
    println!("cargo:rerun-if-changed=image.ld");
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=CARGO_ENCODED_RUSTFLAGS");
    println!("cargo:rustc-check-cfg=cfg(freestanding)");
    let flags = std::env::var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default();
    if !flags.contains("relocation-model=static") {
        return;
    }
    let manifest = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    println!("cargo:rustc-cfg=freestanding");
    for argument in ["-nostartfiles", "-nostdlib", "-static", "-no-pie"] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
    for argument in [
        "--build-id=none",
        "-z,norelro",
        "-z,max-page-size=4096",
        "--no-eh-frame-hdr",
        "--gc-sections",
    ] {
        println!("cargo:rustc-link-arg-bins=-Wl,{argument}");
    }
    println!("cargo:rustc-link-arg-bins=-Wl,-T,{manifest}/image.ld");
}
