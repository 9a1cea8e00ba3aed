//! The whole path on drawn scenes: draw, train `pico` from nothing, export, and hold the runtime to thresholds on scenes that
//! were held out.

use std::path::Path;

use unimo_tests::{Run, program};

/// Share of captions of held-out scenes that name the right shape: chance is 1 in 6. The aim, shape and colour right in 90 %, is
/// not reached yet: 84 % after 1,200 steps on 2,500 scenes, with neighbouring colours confused.
const RIGHT_SHAPES: f64 = 0.9;
/// Recall at 10 among 100 held-out scenes, both ways: chance is 10 % (image to text more), this version reaches 95 %. The aim,
/// recall at 1 of 80 %, is not reached (67 and 59 % after 1,200 steps).
const RECALL_AT_10: f64 = 0.8;

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

    done("unimo-train", &["data", "scenes", "--out", &train, "--count", "1500", "--seed", "21", "--max-objects", "1"]);
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
    let (records, report) = unimo_train::scenes::read_records(&[folder.path().join("dev")]).unwrap();
    assert_eq!((records.len(), report.damaged.len()), (100, 0));
    let lines = std::fs::read_to_string(&captions).unwrap();
    let right = records
        .iter()
        .filter(|(key, record)| {
            let line = lines.lines().find(|line| line.contains(&format!("{key}.jpg"))).unwrap();
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            let graph = serde_json::to_value(&record.graph).unwrap();
            line["caption"].as_str().unwrap().contains(graph["objects"][0]["shape"].as_str().unwrap())
        })
        .count();
    let right = right as f64 / records.len() as f64;
    assert!(right >= RIGHT_SHAPES, "{right} of the captions name the right shape\n{lines}");

    let (images, texts) = (folder.path().join("images.jsonl"), folder.path().join("texts.jsonl"));
    into_file(&images, "unimo", &["embed", "--jsonl", "--bundle", &bundle, "--image", &pictures]);
    let lines = at("pictures/captions.txt");
    into_file(&texts, "unimo", &["embed", "--jsonl", "--bundle", &bundle, "--text-file", &lines]);
    let (images, texts) = (images.display().to_string(), texts.display().to_string());
    let recall =
        done("unimo-train", &["eval", "retrieval", "--references", &dev, "--images", &images, "--texts", &texts, "--json"]);
    for way in ["image_to_text", "text_to_image"] {
        let at_10 = recall.json_lines()[0][way][2].as_f64().unwrap();
        assert!(at_10 >= RECALL_AT_10, "{way}: {at_10}");
    }
}
