//! A plan runs its stages once each, goes on after an interruption, and its model can be reported.

use std::path::Path;

use unimo_tests::{command, program};
use unimo_train::backbone::random_file;
use unimo_train::recipe::Recipe;

const PLAN: &str = r#"
[[stages]]
name = "draw scenes"
makes = "{out}/scenes"
run = ["data", "scenes", "--out", "{out}/scenes", "--count", "8", "--seed", "3"]
[[stages]]
name = "tokenizer"
makes = "{out}/tokenizer.json"
run = ["tokenizer", "--pairs", "{pairs}", "{out}/scenes", "--texts", "{texts}", "--vocabulary", "400", "--out", "{out}/tokenizer.json"]
[[stages]]
name = "pretraining"
makes = "{out}/pretrained"
run = ["pretrain", "--size", "pico", "--recipe", "{recipes}/recipe.toml", "--tokenizer", "{out}/tokenizer.json", "--backbone", "{backbone}", "--pairs", "{pairs}", "--features", "{out}/features", "--out", "{out}/pretrained"]
[[stages]]
name = "captioning"
makes = "{out}/caption"
run = ["finetune", "caption", "--init", "{out}/pretrained", "--recipe", "{recipes}/recipe.toml", "--tokenizer", "{out}/tokenizer.json", "--pairs", "{pairs}", "--dev", "{dev}", "--features", "{out}/features", "--out", "{out}/caption"]
[[stages]]
name = "average"
makes = "{out}/mean"
run = ["average", "{out}/pretrained", "{out}/caption", "--out", "{out}/mean"]
"#;

const RECIPE: &str = "steps = 4\nviews = 1\ncheckpoint_every = 2\nevaluate_every = 2\n[batch]\nimages = 3\ncaptions = 1\n";

fn plan(folder: &Path, more: &[&str]) -> unimo_tests::Run {
    let at = |name: &str| folder.join(name).display().to_string();
    let (config, backbone, pairs, out) = (at("plan.toml"), at("backbone"), at("pairs"), at("out"));
    let mut arguments = vec!["plan", "--config", &config, "--backbone", &backbone, "--pairs", &pairs, "--out", &out];
    arguments.extend(["--dev", &pairs]);
    arguments.extend(more);
    program("unimo-train", &arguments)
}

#[test]
fn the_shipped_models_plan_is_sound() {
    let recipes = Path::new(env!("CARGO_MANIFEST_DIR")).join("../trainer/recipes");
    let config = recipes.join("edge-s.toml").display().to_string();
    let arguments = ["plan", "--config", &config, "--backbone", "b", "--pairs", "p", "q", "--out", "nowhere", "--show"];
    let shown = program("unimo-train", &arguments);
    assert_eq!((shown.code, shown.stdout.lines().count()), (0, 11), "{}", shown.stderr);
    let recipes = shown.stdout.split_whitespace().filter(|word| word.ends_with(".toml"));
    let steps: Vec<u64> = recipes.map(|path| Recipe::from_file(Path::new(path)).unwrap().last_step()).collect();
    assert_eq!(steps, [250, 2200, 600, 800, 600]);
    let card = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("../MODEL_CARD.md")).unwrap();
    for said in ["250 steps", "2,200 steps", "600 steps", "800 steps"] {
        assert!(card.contains(said), "the model card does not speak of {said}");
    }
    // Pretraining takes a plan as well.
    let pretrain = [&["pretrain"], &arguments[1..]].concat();
    assert_eq!(program("unimo-train", &pretrain).stdout, shown.stdout);
    // What the plan is told of the device, every stage that runs the model is.
    let told = [arguments.as_slice(), &["--precision", "bf16", "--device", "cpu"]].concat();
    let told = program("unimo-train", &told).stdout;
    assert_eq!(told.lines().filter(|line| line.ends_with(" --device cpu --precision bf16")).count(), 7, "{told}");
    // Named without a folder it lies in the current one, and so do its recipes.
    let here = command("unimo-train")
        .args(["plan", "--config", "edge-s.toml", "--backbone", "b", "--pairs", "p", "--out", "nowhere", "--show"])
        .current_dir(Path::new(&config).parent().unwrap())
        .output()
        .unwrap();
    let here = String::from_utf8(here.stdout).unwrap();
    assert!(here.contains("--recipe ./edge-s-pretrain.toml"), "{here}");
    // A slip in a late stage is found before the first one runs.
    let folder = tempfile::tempdir().unwrap();
    let text = std::fs::read_to_string(&config).unwrap().replace("\"retrieval\", \"--init\"", "\"retrieval\", \"--begin\"");
    std::fs::write(folder.path().join("plan.toml"), text).unwrap();
    let config = folder.path().join("plan.toml").display().to_string();
    let out = folder.path().join("out").display().to_string();
    let wrong = program("unimo-train", &["plan", "--config", &config, "--backbone", "b", "--pairs", "p", "--out", &out]);
    assert!(wrong.code == 3 && wrong.stderr.contains("embeddings alone") && wrong.stderr.contains("--begin"), "{}", wrong.stderr);
    assert!(!Path::new(&out).exists());
    // Nothing outside OUT may be cleared.
    let kept = folder.path().join("kept");
    std::fs::create_dir(&kept).unwrap();
    for makes in ["{out}/../kept", "{out}", &kept.display().to_string()] {
        let stage = format!("[[stages]]\nname = \"x\"\nmakes = \"{makes}\"\nrun = [\"data\", \"stats\", \"{{pairs}}\"]\n");
        std::fs::write(folder.path().join("plan.toml"), stage).unwrap();
        let wrong = program("unimo-train", &["plan", "--config", &config, "--backbone", "b", "--pairs", "p", "--out", &out]);
        assert!(wrong.code == 3 && wrong.stderr.contains("not below") && kept.is_dir(), "{makes}: {}", wrong.stderr);
    }
}

#[test]
fn a_plan_runs_each_stage_once_and_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("plan.toml"), PLAN).unwrap();
    std::fs::write(at("recipe.toml"), RECIPE).unwrap();
    std::fs::write(at("backbone"), random_file(1).unwrap()).unwrap();
    let pairs = at("pairs").display().to_string();
    assert_eq!(program("unimo-train", &["data", "scenes", "--out", &pairs, "--count", "10", "--seed", "4"]).code, 0);

    let shown = plan(folder.path(), &["--show"]);
    assert_eq!((shown.code, shown.stdout.lines().count()), (0, 5), "{}", shown.stderr);
    // No texts are given: the flag goes with them.
    assert!(!shown.stdout.contains("--texts") && !at("out").exists(), "{}", shown.stdout);

    // What kill -9 leaves in the third stage: scenes and tokenizer done, one checkpoint of the run, half of another.
    let whole = plan(folder.path(), &[]);
    assert_eq!(whole.code, 0, "{}", whole.stderr);
    assert!(at("out/mean/checkpoints/step-00000004/model.safetensors").is_file());
    let model = |run: &str| std::fs::read(at(&format!("out/{run}/checkpoints/step-00000004/model.safetensors"))).unwrap();
    let (pretrained, mean) = (model("pretrained"), model("mean"));
    let done = std::fs::read_to_string(at("out/stages.toml")).unwrap();
    let first: String = done
        .lines()
        .filter(|line| line.starts_with('[') || line.contains("draw") || line.starts_with("tokenizer"))
        .collect::<Vec<_>>()
        .join("\n");
    std::fs::write(at("out/stages.toml"), first).unwrap();
    std::fs::remove_dir_all(at("out/pretrained/checkpoints/step-00000004")).unwrap();
    std::fs::create_dir(at("out/pretrained/checkpoints/step-00000004.tmp")).unwrap();
    for run in ["caption", "mean"] {
        std::fs::remove_dir_all(at("out").join(run)).unwrap();
    }
    let rest = plan(folder.path(), &[]);
    assert_eq!(rest.code, 0, "{}", rest.stderr);
    assert!(rest.stderr.contains("stage 3 of 5: pretraining") && !rest.stderr.contains("stage 2 of 5"), "{}", rest.stderr);
    assert!(rest.stderr.contains("going on after step 2"), "{}", rest.stderr);
    assert!(model("pretrained") == pretrained && model("mean") == mean, "the models differ from those of an uninterrupted plan");
    assert_eq!(std::fs::read_to_string(at("out/stages.toml")).unwrap(), done);

    // Nothing is left to do; and another plan may not take over the folder.
    assert_eq!(plan(folder.path(), &[]).stderr, "");
    std::fs::write(at("plan.toml"), PLAN.replace("\"8\"", "\"9\"")).unwrap();
    let other = plan(folder.path(), &[]);
    assert!(other.code == 3 && other.stderr.contains("by another command"), "{}", other.stderr);

    let (run, page) = (at("out/caption").display().to_string(), at("report.html").display().to_string());
    assert_eq!(program("unimo-train", &["report", "--run", &run, "--out", &page]).code, 0);
    let page = std::fs::read_to_string(&page).unwrap();
    assert!(page.contains("<svg") && page.contains("Last scores") && page.contains("Captions"), "{page}");
    let nothing = program("unimo-train", &["report", "--run", &pairs, "--out", &at("x.html").display().to_string()]);
    assert!(nothing.code == 3 && nothing.stderr.contains("is no run"), "{}", nothing.stderr);
}
