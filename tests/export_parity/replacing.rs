//! What is refused, what is replaced, and what is left alone by it.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::{Device, Tensor as Candle};
use unimo::bundle::manifest::Precision;
use unimo::bundle::{Bundle, BundleSource, MANIFEST};
use unimo_export::export::{ExportOptions, export};
use unimo_export::sample::drawn_samples;
use unimo_export::upgrade::{UpgradeOptions, upgrade};
use unimo_tests::reference::{save, scattered};

use super::{copy, exported, files, open, options};

#[test]
fn an_unusable_checkpoint_is_refused_by_name_and_leaves_nothing() {
    type Break = fn(&Path);
    fn model(folder: &Path, change: fn(&mut HashMap<String, Candle>)) {
        rewrite(&folder.join("model.safetensors"), change);
    }
    fn rewrite(path: &Path, change: fn(&mut HashMap<String, Candle>)) {
        let mut weights = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        change(&mut weights);
        save(&weights, path);
    }
    let cases: [(Break, &str); 9] = [
        (|f| model(f, |w| drop(w.remove("layers.1.ffn.up.bias"))), "lacks `layers.1.ffn.up.bias`"),
        (|f| model(f, |w| drop(w.insert("wings".into(), scattered("w", &[2], 1.0, 0.0)))), "holds `wings`"),
        (
            |f| model(f, |w| drop(w.insert("pool.text.weight".into(), scattered("w", &[64, 32], 1.0, 0.0)))),
            "`pool.text.weight` is [64, 32], the sizes ask for [64, 64]",
        ),
        (|f| rewrite(&f.join("backbone.safetensors"), |w| drop(w.remove("block7.expand.bias"))), "block7.expand.bias"),
        (
            |f| rewrite(&f.join("backbone.safetensors"), |w| drop(w.insert("head.bias".into(), scattered("w", &[9], 1.0, 0.0)))),
            "`head.bias` is [9], expected [1280]",
        ),
        (
            |f| {
                fs::write(f.join("tokenizer.json"), unimo_train::tokenizer_training::train(["a b"].into_iter(), 261).unwrap())
                    .unwrap()
            },
            "the tokenizer has 261 tokens, the model 280",
        ),
        (|f| fs::write(f.join("model.toml"), "hidden = 64").unwrap(), "model.toml"),
        (|f| fs::write(f.join("model.safetensors"), b"cut").unwrap(), "model.safetensors"),
        // More than 16 bits hold.
        (
            |f| model(f, |w| drop(w.insert("text.position.weight".into(), scattered("w", &[40, 64], 1.0, 1e5)))),
            "text.position.weight",
        ),
    ];
    for (break_it, message) in cases {
        let (broken, out) = (copy(exported().checkpoint.path()), tempfile::tempdir().unwrap());
        break_it(broken.path());
        let target = out.path().join("bundle.tar");
        let error = export(broken.path(), &target, &options(&[Precision::F16]), &drawn_samples(1), &|_, _| ()).unwrap_err();
        let error = format!("{error:#}");
        assert!(error.contains(message), "{error:?} lacks {message:?}");
        assert_eq!(fs::read_dir(out.path()).unwrap().count(), 0, "left behind after: {error}");
    }
}

#[test]
fn a_bundle_that_is_there_is_replaced_only_when_asked_and_only_by_a_good_one() {
    let (exported, out) = (exported(), tempfile::tempdir().unwrap());
    let target = out.path().join("bundle");
    fs::create_dir(&target).unwrap();
    fs::write(target.join("precious"), "x").unwrap();
    // What an export that was killed leaves behind.
    fs::create_dir(out.path().join("bundle.partial")).unwrap();
    fs::write(out.path().join("bundle.partial/half"), "y").unwrap();
    let run = |checkpoint: &Path, force: bool| {
        let options = ExportOptions { force, ..options(&[Precision::F16]) };
        export(checkpoint, &target, &options, &drawn_samples(1), &|_, _| ()).map_err(|error| format!("{error:#}"))
    };
    let error = run(exported.checkpoint.path(), false).unwrap_err();
    assert!(error.contains("is already there; --force replaces it"), "{error}");

    let broken = copy(exported.checkpoint.path());
    fs::write(broken.path().join("model.safetensors"), b"cut").unwrap();
    run(broken.path(), true).unwrap_err();
    assert_eq!(fs::read_to_string(target.join("precious")).unwrap(), "x");

    run(exported.checkpoint.path(), true).unwrap();
    open(&target).verify().unwrap();
    assert!(!target.join("precious").exists() && !target.join("half").exists());
    let left: Vec<_> = fs::read_dir(out.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(left, ["bundle"]);
}

#[test]
fn a_bundle_of_the_first_version_is_written_anew() {
    let exported = exported();
    let current = files(&exported.bundle());
    let manifest = String::from_utf8(current[MANIFEST].clone()).unwrap();
    // The first version's graph read one hypothesis, in slots of its own; all other graphs are what they were.
    let model = &open(&exported.bundle()).manifest().model.clone();
    let mut table: toml::Table = manifest.parse().unwrap();
    table.insert("schema".to_owned(), 1.into());
    for graph in table["graphs"].as_array_mut().unwrap() {
        for kind in ["inputs", "outputs"] {
            let tensors = graph[kind].as_array_mut().unwrap();
            for size in tensors.iter_mut().flat_map(|tensor| tensor["shape"].as_array_mut().unwrap()) {
                match size.as_str() {
                    Some("hypotheses") => *size = 1.into(),
                    Some("slots") => *size = (model.max_text as i64).into(),
                    _ => {}
                }
            }
        }
    }
    let first = copy(&exported.bundle());
    fs::write(first.path().join(MANIFEST), toml::to_string(&table).unwrap()).unwrap();
    let refused = Bundle::open(&BundleSource::Path(first.path().to_owned())).unwrap_err().to_string();
    assert!(refused.contains("it has schema 1") && refused.contains("unimo-export upgrade"), "{refused}");

    let out = first.path().join("new");
    let once = UpgradeOptions::default();
    let report = upgrade(first.path(), &out, &once, &drawn_samples(1), &|_, _| ()).unwrap().0;
    assert_eq!(files(&out), current);
    let compared: Vec<&str> = report.outputs.iter().map(|output| output.graph.as_str()).collect();
    assert_eq!(compared, ["vision", "vision", "vision", "vision", "text", "match"]);
    assert!(upgrade(first.path(), &out, &once, &[], &|_, _| ()).unwrap_err().to_string().contains("--force"));

    // Weights that changed on the way are found out before anything is written.
    let weights = first.path().join(format!("{}/weights.bin", Precision::F32));
    let mut bytes = fs::read(&weights).unwrap();
    bytes[100] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let damaged = format!("{:#}", upgrade(first.path(), &first.path().join("again"), &once, &[], &|_, _| ()).unwrap_err());
    assert!(damaged.contains("weights.bin is damaged"), "{damaged}");
    assert!(!first.path().join("again").exists());
}
