//! Malformed bundles: each fault is refused by `bundle verify` and by the commands that would run the bundle, with exit code 3
//! and one sentence that says what is wrong, and nothing panics.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use image::{Rgb, RgbImage};
use unimo::bundle::manifest::{GraphSignature, Manifest};
use unimo::bundle::sha256_hex;
use unimo_tests::{engine, program};

static BUNDLE: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bundle_malformed");
    unimo_export::sample::random_bundle(&folder, 5).unwrap()
});

/// A bundle folder to be broken.
struct Victim(tempfile::TempDir);

impl Victim {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        tar::Archive::new(fs::File::open(&*BUNDLE).unwrap()).unpack(folder.path()).unwrap();
        Self(folder)
    }

    fn path(&self, file: &str) -> PathBuf {
        self.0.path().join(file)
    }

    fn edit(&self, file: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(self.path(file)).unwrap();
        change(&mut bytes);
        fs::write(self.path(file), bytes).unwrap();
    }

    fn edit_manifest(&self, change: impl FnOnce(&mut Manifest)) {
        self.edit("manifest.toml", |bytes| {
            let mut manifest = Manifest::parse(bytes).unwrap();
            change(&mut manifest);
            *bytes = manifest.to_toml().unwrap().into_bytes();
        });
    }

    /// Changes a file and gives the manifest its new hash: what a careful forger would do.
    fn forge(&self, file: &str, change: impl FnOnce(&mut Vec<u8>)) {
        self.edit(file, change);
        let hash = sha256_hex(&fs::read(self.path(file)).unwrap());
        self.edit_manifest(|manifest| drop(manifest.files.insert(file.to_owned(), hash)));
    }

    /// Changes the manifest's text.
    fn replace(&self, from: &str, to: &str) {
        self.edit("manifest.toml", |bytes| {
            let text = String::from_utf8(bytes.clone()).unwrap();
            assert!(text.contains(from), "{from:?} is not in the manifest");
            *bytes = text.replacen(from, to, 1).into_bytes();
        });
    }
}

fn assert_refused(bundle: &Path, message: &str) {
    let folder = tempfile::tempdir().unwrap();
    let picture = folder.path().join("picture.png");
    RgbImage::from_pixel(32, 32, Rgb([200, 30, 30])).save(&picture).unwrap();
    let (bundle, picture) = (bundle.to_str().unwrap(), picture.to_str().unwrap());
    for arguments in [&["bundle", "verify", bundle][..], &["caption", picture, "--bundle", bundle]] {
        let run = program("unimo", arguments);
        assert_eq!((run.code, run.stdout.as_str()), (3, ""), "{arguments:?}: {}", run.stderr);
        // ONNX Runtime has its own words for a weight beyond the file's end.
        let other =
            engine() == "ort" && message.contains("out of range") && run.stderr.contains("graph \"vision\" cannot be loaded");
        assert!(run.stderr.contains(message) || other, "{arguments:?}: {:?} lacks {message:?}", run.stderr);
        assert!(run.stderr.starts_with("error: ") && run.stderr.lines().count() == 1, "{}", run.stderr);
    }
}

#[test]
fn the_unbroken_bundle_is_accepted() {
    let victim = Victim::new();
    let run = program("unimo", &["bundle", "verify", victim.0.path().to_str().unwrap()]);
    assert_eq!(run.code, 0, "{}", run.stderr);
}

#[test]
fn each_fault_is_named() {
    type Break = fn(&Victim);
    let cases: [(Break, &str); 14] = [
        (|v| v.edit("f16/weights.bin", |bytes| bytes[1000] ^= 1), "f16/weights.bin is damaged"),
        (|v| v.edit("f16/vision.onnx", |bytes| bytes[100] ^= 64), "f16/vision.onnx is damaged"),
        (|v| v.edit("tokenizer.json", |bytes| bytes.push(b' ')), "tokenizer.json is damaged"),
        (|v| v.replace("schema = 2", "schema = 3"), "it has schema 3, this program reads up to 2: a newer unimo is needed"),
        (
            |v| v.replace("schema = 2", "schema = 1"),
            "it has schema 1, this program reads 2: `unimo-export upgrade` writes it anew",
        ),
        (|v| v.replace("schema = 2", "schema = 2\nnovelty = 1"), "malformed manifest: unknown field `novelty`"),
        (|v| v.replace("schema = 2", "schema = "), "malformed manifest"),
        (|v| v.edit_manifest(|m| m.graphs.retain(|graph| graph.name != "decode")), "the manifest lists no graph \"decode\""),
        (|v| fs::remove_file(v.path("f16/decode.onnx")).unwrap(), "f16/decode.onnx is missing"),
        (|v| fs::remove_file(v.path("manifest.toml")).unwrap(), "manifest.toml is missing"),
        (|v| v.edit_manifest(|m| m.model.layers = 0), "model.layers is 0, outside 1..=128"),
        (|v| v.edit_manifest(|m| m.model.embedding += 1), "graph \"vision\" has output embedding"),
        // Every tensor's offset stays, the file ends before most of them.
        (|v| v.forge("f16/weights.bin", |bytes| bytes.truncate(64)), "is out of range: "),
        (|v| v.forge("f16/vision.onnx", |bytes| bytes.truncate(bytes.len() / 2)), "graph \"vision\" cannot be loaded"),
    ];
    for (break_it, message) in cases {
        let victim = Victim::new();
        break_it(&victim);
        assert_refused(victim.0.path(), message);
    }
}

#[test]
fn a_tokenizer_of_another_size_is_refused() {
    let victim = Victim::new();
    victim.edit_manifest(|manifest| {
        manifest.model.vocabulary += 1;
        manifest.graphs = GraphSignature::contract(&manifest.model, &manifest.image);
    });
    assert_refused(victim.0.path(), "tokenizer.json has ");
}

#[test]
fn graphs_of_another_size_are_refused() {
    let victim = Victim::new();
    victim.edit_manifest(|manifest| {
        manifest.model.embedding *= 2;
        manifest.graphs = GraphSignature::contract(&manifest.model, &manifest.image);
    });
    assert_refused(victim.0.path(), "graph \"vision\"");
}

#[test]
fn archives_cut_short_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let whole = fs::read(&*BUNDLE).unwrap();
    for (name, length, message) in [
        ("half.tar", whole.len() / 2, "cut short inside"),
        ("stub.tar", 100, "not a whole .tar archive"),
        ("empty.tar", 0, "manifest.toml is missing"),
    ] {
        let path = folder.path().join(name);
        fs::write(&path, &whole[..length]).unwrap();
        assert_refused(&path, message);
    }
}

#[test]
fn other_files_are_no_bundles() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("letter.tar");
    fs::write(&text, "Dear reader, ".repeat(500)).unwrap();
    assert_refused(&text, "not a whole .tar archive");
    assert_refused(&folder.path().join("nothing.tar"), "there is no such folder or file");
    assert_refused(folder.path(), "manifest.toml is missing");
}
