//! The whole path on drawn scenes: draw, train `pico` from nothing, export, and hold the runtime to thresholds on scenes that
//! were held out.

use std::path::Path;

use unimo_tests::{Run, program};

/// Share of captions of held-out scenes that name exactly the right shape and colour. Chance is 1 in 48.
const RIGHT: f64 = 0.9;
/// Recall at 1 among 100 held-out scenes, both ways: chance is 1 % (5 % image to text). Text to image cannot pass 94 %: some
/// captions fit several scenes.
const RECALL_AT_1: f64 = 0.8;

fn done(name: &str, arguments: &[&str]) -> Run {
    let run = program(name, arguments);
    assert_eq!(run.code, 0, "{name} {arguments:?}\n{}\n{}", run.stdout, run.stderr);
    run
}

/// Runs a program whose output becomes a file.
fn into_file(file: &Path, name: &str, arguments: &[&str]) {
    std::fs::write(file, done(name, arguments).stdout).unwrap();
}

#[test]
fn pico_learns_drawn_scenes_and_the_runtime_tells_and_finds_them() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let recipe = root.join("trainer/recipes/pico-scenes.toml").display().to_string();
    let default_bundle = root.join("runtime/bundle/default.tar").display().to_string();
    let (train, dev, backbone, tokenizer) = (at("train"), at("dev"), at("backbone.safetensors"), at("tokenizer.json"));

    done("unimo-train", &["data", "scenes", "--out", &train, "--count", "4000", "--seed", "21", "--max-objects", "1"]);
    done(
        "unimo-train",
        &[
            "data",
            "scenes",
            "--out",
            &dev,
            "--count",
            "100",
            "--seed",
            "22",
            "--max-objects",
            "1",
            "--distinct",
            "--exclude",
            &train,
        ],
    );
    done("unimo-export", &["backbone", "--bundle", &default_bundle, "--out", &backbone]);
    done("unimo-train", &["tokenizer", "--pairs", &train, "--vocabulary", "400", "--out", &tokenizer]);
    let mut arguments = vec!["pretrain", "--size", "pico", "--recipe", &recipe, "--tokenizer", &tokenizer];
    let run = at("run");
    arguments.extend(["--backbone", &backbone, "--pairs", &train, "--out", &run, "--data-note", "drawn scenes"]);
    done("unimo-train", &arguments);
    let bundle = at("pico.tar");
    done("unimo-export", &["--checkpoint", &run, "--out", &bundle, "--verify", &dev]);
    let pictures = at("pictures");
    done("unimo-train", &["data", "unpack", &dev, "--out", &pictures]);

    let captions = folder.path().join("captions.jsonl");
    into_file(&captions, "unimo", &["caption", "--jsonl", "--bundle", &bundle, &pictures]);
    let captions = captions.display().to_string();
    let scores = done("unimo-train", &["eval", "scenes", "--references", &dev, "--predictions", &captions, "--json"]);
    let scores = &scores.json_lines()[0];
    assert_eq!(scores["captions"], 100, "{scores}");
    let right = scores["right"].as_f64().unwrap();
    assert!(right >= RIGHT, "{right} of the captions name the right shape and colour: {scores}");

    let (images, texts) = (folder.path().join("images.jsonl"), folder.path().join("texts.jsonl"));
    into_file(&images, "unimo", &["embed", "--jsonl", "--bundle", &bundle, "--image", &pictures]);
    let lines = at("pictures/captions.txt");
    into_file(&texts, "unimo", &["embed", "--jsonl", "--bundle", &bundle, "--text-file", &lines]);
    let (images, texts) = (images.display().to_string(), texts.display().to_string());
    let recall =
        done("unimo-train", &["eval", "retrieval", "--references", &dev, "--images", &images, "--texts", &texts, "--json"]);
    for way in ["image_to_text", "text_to_image"] {
        let at_1 = recall.json_lines()[0][way][0].as_f64().unwrap();
        assert!(at_1 >= RECALL_AT_1, "{way}: {at_1}");
    }
}
