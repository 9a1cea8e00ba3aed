//! `--device` of the commands that compute: the CPU when asked for, and one sentence with its exit code for a device that is not
//! there. A build without CUDA is meant; one with it has more to say (see trainer/gpu).

use unimo_tests::program;

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
fn the_cpu_computes_in_f32_only() {
    let folder = tempfile::tempdir().unwrap();
    let recipe = folder.path().join("recipe.toml");
    std::fs::write(&recipe, "steps = 1\n[batch]\nimages = 2\ncaptions = 1\n").unwrap();
    let command = format!("pretrain --recipe {} --tokenizer T --out O --precision bf16", recipe.display());
    let (code, said) = run(&command, "cpu");
    assert!(code == 3 && said.contains("the CPU computes in f32"), "{code} {said}");
}
