//! `--device` of the commands that compute: the CPU when asked for, and one sentence with its exit code for a device that is not
//! there. A build without CUDA is meant; one with it has more to say (see trainer/gpu).

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use unimo_tests::{path, program};
use unimo_train::backbone::random_file;

/// Every command that takes `--device`, with files that do not exist.
const COMMANDS: [&str; 6] = [
    "pretrain --recipe R --tokenizer T --out O",
    "finetune caption --init I --tokenizer T --out O",
    "eval checkpoint --checkpoint C --dev D --features F",
    "eval task --checkpoint C --examples E --features F",
    "eval written --checkpoint C --sources S --targets T",
    "gpu check",
];

fn run(command: &str, device: &str) -> (i32, String) {
    let words: Vec<&str> = command.split(' ').chain(["--device", device]).collect();
    let run = program("unimo-train", &words);
    (run.code, run.stderr)
}

#[test]
fn devices_have_names() {
    for command in COMMANDS {
        for device in ["gpu", "cuda:", "cuda:-1", "1"] {
            let (code, said) = run(command, device);
            assert!(
                code == 2 && said.contains("expected auto, cpu, cuda or cuda:N"),
                "{command} --device {device}: {code} {said}"
            );
        }
    }
}

#[test]
fn a_build_without_cuda_says_so_in_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = folder.path().join("recipe.toml");
    std::fs::write(&recipe, "steps = 1\n[batch]\nimages = 2\ncaptions = 1\n").unwrap();
    let pretrain =
        format!("pretrain --size pico --recipe {} --tokenizer T --out {}/run", recipe.display(), folder.path().display());
    for command in [pretrain.as_str(), "gpu check"] {
        for device in ["cuda", "cuda:1"] {
            let (code, said) = run(command, device);
            assert_eq!(code, 5, "{command}: {said}");
            assert_eq!(said.trim_end().lines().count(), 1, "{said}");
            assert!(said.contains("this build trains on the CPU only"), "{said}");
        }
    }
    // On the CPU it goes on to the tokenizer, which is not there.
    for device in ["cpu", "auto"] {
        let (code, said) = run(&pretrain, device);
        assert!(code == 3 && !said.contains("CUDA"), "--device {device}: {code} {said}");
    }
}

#[test]
fn the_cpu_computes_in_f32_or_where_it_can_in_bf16() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = folder.path().join("recipe.toml");
    std::fs::write(&recipe, "steps = 1\n[batch]\nimages = 2\ncaptions = 1\n").unwrap();
    let (recipe, out) = (recipe.display(), folder.path().join("run"));
    let command = |precision| format!("pretrain --recipe {recipe} --tokenizer T --out {} --precision {precision}", out.display());
    let (code, said) = run(&command("tf32"), "cpu");
    assert!(code == 3 && said.contains("the CPU computes in f32 or bf16"), "{code} {said}");
    // Where it can it goes on to the tokenizer, which is not there.
    let (code, said) = run(&command("bf16"), "cpu");
    assert_eq!((code, said.contains("processor with Intel's AMX")), (3, !unimo_train::ops::kernels::amx::available()), "{said}");
}

#[test]
fn bf16_changes_the_numbers_of_a_step_and_not_by_much() {
    if !unimo_train::ops::kernels::amx::available() {
        return eprintln!("no AMX here: bf16 was not trained with");
    }
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let (pairs, tokenizer, recipe, backbone) = (at("pairs"), at("tokenizer.json"), at("recipe.toml"), at("backbone"));
    std::fs::write(&recipe, "steps = 2\nviews = 1\n[batch]\nimages = 4\ncaptions = 2\n").unwrap();
    std::fs::write(&backbone, random_file(1).unwrap()).unwrap();
    let done = |arguments: &[&str]| {
        let run = program("unimo-train", arguments);
        assert_eq!(run.code, 0, "{}", run.stderr);
    };
    done(&["data", "scenes", "--out", &pairs, "--count", "8", "--seed", "4"]);
    done(&["tokenizer", "--pairs", &pairs, "--vocabulary", "400", "--out", &tokenizer]);
    let numbers = |precision: &str| {
        let (out, features) = (at(precision), at("features"));
        let mut arguments = vec!["pretrain", "--size", "pico", "--recipe", &recipe, "--tokenizer", &tokenizer, "--out", &out];
        arguments.extend(["--backbone", &backbone, "--pairs", &pairs, "--features", &features]);
        done(&[arguments.as_slice(), &["--device", "cpu", "--precision", precision]].concat());
        let log = std::fs::read_to_string(Path::new(&out).join("log.jsonl")).unwrap();
        let first: serde_json::Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
        ["loss", "gradient_norm"].map(|name| first[name].as_f64().unwrap())
    };
    let ([loss, gradient], [rounded_loss, rounded_gradient]) = (numbers("f32"), numbers("bf16"));
    let change = |from: f64, to: f64| (to / from - 1.0).abs();
    let (loss, gradient) = (change(loss, rounded_loss), change(gradient, rounded_gradient));
    // Eight bits round by up to 0.2 %; f32 summed in another order changes the seventh digit.
    assert!((1e-6..1e-2).contains(&loss) && (1e-6..5e-2).contains(&gradient), "{loss} {gradient}");
}

/// The script for machines with a GPU, in a folder as it packs one, with a program whose CUDA device is the CPU: it ends with 0 or 1
/// as what it ran has, and keeps what was printed. Trainings are compared for real.
#[test]
fn the_check_for_gpus_ends_as_what_it_found() {
    let folder = tempfile::tempdir().unwrap();
    let (script, results) = (folder.path().join("check.sh"), folder.path().join("results"));
    std::fs::copy(Path::new(env!("CARGO_MANIFEST_DIR")).join("../trainer/gpu/check.sh"), &script).unwrap();
    let run = |part: &str, verdict: &str| {
        let mut check = Command::new(&script);
        check.arg(part).env("RESULTS", &results).env("VERDICT", verdict);
        let output = check.output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, _, said) = run("kernels", "0");
    assert!(code == Some(2) && said.contains("check.sh pack makes a folder with it"), "{code:?} {said}");

    let stand_in = folder.path().join("target/release/unimo-train");
    std::fs::create_dir_all(stand_in.parent().unwrap()).unwrap();
    let trainer = path("unimo-train");
    let text = format!(
        "#!/usr/bin/env bash\n\
         if [ \"$1\" = gpu ]; then echo a line; exit \"$VERDICT\"; fi\n\
         for word; do words+=(\"$([ \"$word\" = cuda ] && echo cpu || echo \"$word\")\"); done\n\
         exec '{}' \"${{words[@]}}\"\n",
        trainer.display()
    );
    std::fs::write(&stand_in, text).unwrap();
    std::fs::set_permissions(&stand_in, std::fs::Permissions::from_mode(0o755)).unwrap();
    let kept = |part: &str| std::fs::read_to_string(results.join(format!("{part}.txt"))).unwrap();

    let (code, said, _) = run("kernels", "0");
    assert!(code == Some(0) && said.ends_with("all right\n"), "{code:?} {said}");
    assert_eq!(kept("kernels"), "a line\n");
    let (code, said, _) = run("kernels", "6");
    assert!(code == Some(1) && said.contains("FAILED (6)") && said.ends_with("something is wrong\n"), "{code:?} {said}");
    let (code, said, _) = run("train", "0");
    assert!(code == Some(0) && said.ends_with("all right\n"), "{code:?} {said}");
    assert!(kept("training").contains("losses of 20 steps: apart by"), "{}", kept("training"));
    let (code, _, said) = run("everything", "0");
    assert!(code == Some(2) && said.contains("usage: "), "{code:?} {said}");
}
