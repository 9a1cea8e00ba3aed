//! Tells the crate whether a default bundle is there to be compiled in (feature `embedded-bundle`).

use std::path::Path;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(has_default_bundle)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=bundle");
    if Path::new("bundle/default.tar").is_file() {
        println!("cargo::rustc-cfg=has_default_bundle");
    }
}
