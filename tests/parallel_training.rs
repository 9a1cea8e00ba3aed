//! Several processes train one model as one process would: the same curve, checkpoints for any number of ranks, and nobody waits
//! for a rank that is gone.

use std::collections::BTreeMap;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use unimo_tests::{Run, path, program};
use unimo_train::backbone;
use unimo_train::model::{ImageEmbedding, ModelConfig, TextEmbedding};

/// Every objective that compares or averages, with dropout. As many passes as the most ranks that are tried: dropout goes by the
/// pass, so the passes of one process are those of the ranks.
const RECIPE: &str = "
steps = 12
views = 2
dropout = 0.1
checkpoint_every = 4
evaluate_every = 100
[batch]
chunks = 4
images = 7
hidden_regions = 0.1
captions = 2
sampled_captions = 2
contrast_captions = 2
match_images = 4
match_negatives = 2
match_rewrites = 1
retrieved_pairs = 5
retrieved_images = 2
retrieved_texts = 1
masked_pairs = 4
fragment_pairs = 3
texts = 5
fragment_texts = 3
images_alone = 3
[weights]
cross_modal = 0.5
[optimizer]
learning_rate = 1e-3
warmup_steps = 2
";

/// Pictures contrasted by their mean features, further ones among them. As many passes as the most ranks that are tried.
const POOLED: &str = "
steps = 8
views = 2
dropout = 0.1
checkpoint_every = 4
evaluate_every = 100
[batch]
chunks = 4
images = 5
hidden_regions = 0.1
captions = 1
contrast_captions = 2
contrast_pairs = 9
match_images = 3
match_negatives = 1
retrieved_pairs = 4
retrieved_images = 2
retrieved_texts = 1
texts = 3
[weights]
cross_modal = 0.5
[optimizer]
learning_rate = 1e-3
warmup_steps = 2
";

/// Of losses, gradients' norms and temperatures, relative to 1 plus their size. Ranks add up gradients and the exponentials of a
/// contrast in f32 in another order than one process does, and the sums of a pass that is cut in two begin anew in the second
/// part. From about 1e-7 in the first step, a dozen steps with AdamW were seen to make 8e-7 where the passes are the same, and
/// 1e-5 where they are cut.
const TOLERANCE: f64 = 1e-4;

/// Variables by which a process knows that it is a rank.
const LAUNCHERS: [&str; 14] = [
    "RANK",
    "WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "PMI_RANK",
    "PMI_SIZE",
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_NUM_TASKS",
    "UNIMO_RANKS_TIMEOUT",
];

/// Data, and what is trained on it.
struct Bench {
    folder: TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Self { folder: tempfile::tempdir().unwrap() };
        let texts: Vec<String> = (0..30).map(|i| format!("a text about {i} things and {} more circles", i % 3)).collect();
        std::fs::write(bench.at("texts.txt"), texts.join("\n")).unwrap();
        std::fs::write(bench.at("backbone"), backbone::random_file(1).unwrap()).unwrap();
        bench.recipe("recipe.toml", RECIPE);
        for command in [
            "data scenes --out {}/scenes --count 20 --seed 5",
            "tokenizer --pairs {}/scenes --texts {}/texts.txt --vocabulary 350 --out {}/tokenizer.json",
            "rewrite --pairs {}/scenes --out {}/rewrites",
            "retrieve --pairs {}/scenes --images {}/scenes --texts {}/texts.txt --backbone {}/backbone --features {}/looks \
             --out {}/retrieved",
        ] {
            let words = bench.words(command);
            let run = program("unimo-train", &words.iter().map(String::as_str).collect::<Vec<_>>());
            assert_eq!(run.code, 0, "{command}\n{}", run.stderr);
        }
        bench
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn recipe(&self, name: &str, text: &str) {
        std::fs::write(self.at(name), text).unwrap();
    }

    fn words(&self, command: &str) -> Vec<String> {
        command.split_whitespace().map(|word| word.replace("{}", &self.folder.path().display().to_string())).collect()
    }

    /// What pretrains `run`, without a launcher.
    fn pretrain(&self, run: &str, more: &str) -> Command {
        let mut command = Command::new(path("unimo-train"));
        without_launcher(&mut command);
        command.args(self.pretrain_words(run, more)).env("UNIMO_RANKS_TIMEOUT", "60");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    fn pretrain_words(&self, run: &str, more: &str) -> Vec<String> {
        let recipe = if more.contains("--recipe") { "" } else { "--recipe {}/recipe.toml" };
        let size = if more.contains("--size") { "" } else { "--size pico" };
        self.words(&format!(
            "pretrain {size} --tokenizer {{}}/tokenizer.json --backbone {{}}/backbone --pairs {{}}/scenes \
             --images {{}}/scenes --texts {{}}/texts.txt --rewrites {{}}/rewrites --retrieved {{}}/retrieved --features {{}}/features \
             --out {{}}/{run} {recipe} {more}"
        ))
    }

    /// The processes of as many ranks, as torchrun would start them.
    fn ranks(&self, ranks: usize, run: &str, more: &str) -> Vec<Child> {
        // Free a moment ago, and the kernel gives out others first.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        (0..ranks).map(|rank| as_rank(self.pretrain(run, more), rank, ranks, port)).collect()
    }

    /// Trains with as many ranks; one is a process without a launcher.
    fn train(&self, ranks: usize, run: &str, more: &str) {
        let children = match ranks {
            1 => vec![self.pretrain(run, more).spawn().unwrap()],
            _ => self.ranks(ranks, run, more),
        };
        for (rank, run) in children.into_iter().map(ended).enumerate() {
            assert_eq!(run.code, 0, "rank {rank}: {}", run.stderr);
            // The checkpoint's name, and what is told on the way: rank 0 speaks for all.
            assert_eq!(run.stdout.lines().count(), usize::from(rank == 0), "rank {rank}: {}", run.stdout);
            assert_eq!(run.stderr.is_empty(), rank > 0, "rank {rank}: {}", run.stderr);
        }
    }

    /// Losses by objective of every step in a run's log, its gradients' norms with them.
    fn curve(&self, run: &str) -> Vec<BTreeMap<String, f64>> {
        let log = std::fs::read_to_string(self.at(run).join("log.jsonl")).unwrap();
        let of_line = |(i, line): (usize, &str)| {
            let entry: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!(entry["step"], i + 1);
            let losses = entry["objectives"].as_object().unwrap().iter();
            let mut losses: BTreeMap<String, f64> = losses.map(|(name, loss)| (name.clone(), loss.as_f64().unwrap())).collect();
            for name in ["loss", "gradient_norm", "rows", "pictures", "temperature", "reward"] {
                losses.insert(name.into(), entry[name].as_f64().unwrap_or_default());
            }
            losses
        };
        log.lines().enumerate().map(of_line).collect()
    }
}

/// These tests themselves may have been launched.
fn without_launcher(command: &mut Command) {
    for name in LAUNCHERS {
        command.env_remove(name);
    }
}

fn as_rank(mut command: Command, rank: usize, ranks: usize, port: u16) -> Child {
    let variables = [("RANK", rank.to_string()), ("WORLD_SIZE", ranks.to_string()), ("MASTER_PORT", port.to_string())];
    command.envs(variables).env("MASTER_ADDR", "127.0.0.1").spawn().unwrap()
}

fn ended(child: Child) -> Run {
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Run { code: output.status.code().unwrap_or(-1), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// Compares curves and gives the largest relative difference.
fn assert_alike(got: &[BTreeMap<String, f64>], expected: &[BTreeMap<String, f64>], what: &str) -> f64 {
    assert_eq!(got.len(), expected.len(), "{what}");
    let mut largest = 0f64;
    for (step, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(got.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>(), "{what}, step {step}");
        for (name, value) in expected {
            let difference = (got[name] - value).abs() / (1.0 + value.abs());
            assert!(difference < TOLERANCE, "{what}, step {step}, {name}: {} against {value}", got[name]);
            largest = largest.max(difference);
        }
    }
    println!("{what}: differs by at most {largest:.1e}");
    largest
}

#[test]
fn the_curve_is_that_of_one_process_whatever_the_number_of_ranks() {
    let bench = Bench::new();
    bench.train(1, "one", "");
    let one = bench.curve("one");
    assert_eq!(one.len(), 12);
    assert_eq!(one[0].len(), 6 + 10, "an objective is missing: {:?}", one[0].keys());
    assert!(one[11]["loss"] < one[0]["loss"], "nothing is learnt");
    for ranks in [2, 3, 4] {
        let run = format!("of-{ranks}");
        bench.train(ranks, &run, "");
        assert_alike(&bench.curve(&run), &one, &run);
    }
    bench.train(3, "again", "");
    assert_eq!(bench.curve("again"), bench.curve("of-3"), "two runs differ");

    // One pass of one process, without dropout, cut into one for each rank. A cut could tip a draw of a caption; without any, the
    // next batch is drawn while one is learnt from.
    let whole = RECIPE.replace("chunks = 4", "").replace("dropout = 0.1", "dropout = 0.0");
    bench.recipe("whole.toml", &whole.replace("sampled_captions = 2", ""));
    bench.train(1, "whole", "--recipe {}/whole.toml");
    bench.train(2, "halves", "--recipe {}/whole.toml");
    assert_alike(&bench.curve("halves"), &bench.curve("whole"), "halves");
}

#[test]
fn further_pairs_are_shared_out_among_ranks() {
    let bench = Bench::new();
    let (image_embedding, text_embedding) = (ImageEmbedding::Pooled, TextEmbedding::Both);
    let size = ModelConfig { image_embedding, text_embedding, ..ModelConfig::named("pico").unwrap() };
    bench.recipe("pooled-size.toml", &toml::to_string(&size).unwrap());
    bench.recipe("pooled.toml", POOLED);
    let more = "--size {}/pooled-size.toml --recipe {}/pooled.toml";
    bench.train(1, "one", more);
    let one = bench.curve("one");
    for ranks in [2, 4] {
        let run = format!("of-{ranks}");
        bench.train(ranks, &run, more);
        assert_alike(&bench.curve(&run), &one, &run);
    }

    // In the first contrast alone; one pass, without dropout, that is cut in two. Then nothing but further pairs, and then with
    // nothing learnt but the embeddings.
    let plain = POOLED.replace("chunks = 4", "").replace("dropout = 0.1", "dropout = 0.0").replace("cross_modal = 0.5", "");
    let plain = plain.replace("retrieved_pairs = 4", "");
    let alone = "steps = 4\nviews = 2\ndropout = 0.0\n[batch]\nimages = 0\ncaptions = 0\ncontrast_pairs = 9\n";
    let heads = format!("trained = ['embed.', 'temperature']\n{alone}");
    for (name, recipe) in [("plain", plain.as_str()), ("alone", alone), ("heads", &heads)] {
        bench.recipe(&format!("{name}.toml"), recipe);
        let more = format!("--size {{}}/pooled-size.toml --recipe {{}}/{name}.toml");
        let runs = [1, 2].map(|ranks| {
            let run = format!("{name}-{ranks}");
            bench.train(ranks, &run, &more);
            bench.curve(&run)
        });
        assert_alike(&runs[1], &runs[0], name);
    }
}

#[test]
fn a_backbone_is_trained_by_ranks_as_by_one_process() {
    let bench = Bench::new();
    let recipe = RECIPE.replace("views = 2", "views = 2\ntrained_blocks = 2").replace("steps = 12", "steps = 4");
    bench.recipe("trained.toml", &recipe.replace("masked_pairs = 4", "").replace("images_alone = 3", ""));
    bench.train(1, "one", "--recipe {}/trained.toml");
    bench.train(2, "two", "--recipe {}/trained.toml");
    assert_alike(&bench.curve("two"), &bench.curve("one"), "with the backbone");
}

#[test]
fn a_run_goes_on_with_another_number_of_ranks() {
    let bench = Bench::new();
    bench.train(1, "whole", "");
    let whole = bench.curve("whole");
    // The newest checkpoints are those of steps 4 and 8.
    bench.train(2, "cut", "--stop-after 6");
    assert_alike(&bench.curve("cut"), &whole[..6], "two ranks");
    bench.train(3, "cut", "--resume --stop-after 5");
    assert_alike(&bench.curve("cut"), &whole[..9], "then three");
    bench.train(1, "cut", "--resume");
    assert_alike(&bench.curve("cut"), &whole, "then one");
    let checkpoints = std::fs::read_dir(bench.at("cut").join("checkpoints")).unwrap();
    let mut names: Vec<String> = checkpoints.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["step-00000008", "step-00000012"]);
}

/// Waits until a run's log has a number of lines.
fn wait_for_lines(log: &Path, lines: usize) {
    let started = Instant::now();
    while std::fs::read_to_string(log).unwrap_or_default().lines().count() < lines {
        assert!(started.elapsed() < Duration::from_secs(120), "the log does not grow");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn when_a_rank_is_killed_the_others_stop_and_nothing_is_lost_since_the_last_checkpoint() {
    let bench = Bench::new();
    bench.recipe("long.toml", &RECIPE.replace("steps = 12", "steps = 400\nends_at = 14"));
    bench.recipe("longer.toml", &RECIPE.replace("steps = 12", "steps = 400"));
    bench.train(1, "whole", "--recipe {}/long.toml");
    let whole = bench.curve("whole");
    for killed in [0, 1] {
        let run = format!("killed-{killed}");
        let mut children = bench.ranks(2, &run, "--recipe {}/longer.toml");
        wait_for_lines(&bench.at(&run).join("log.jsonl"), 6);
        children[killed].kill().unwrap();
        let runs: Vec<Run> = children.into_iter().map(ended).collect();
        assert_eq!(runs[killed].code, -1, "the rank had ended by itself");
        let left = &runs[1 - killed];
        let last = left.stderr.lines().last().unwrap();
        assert_eq!(left.code, 3, "{}", left.stderr);
        assert!(last.starts_with(&format!("error: rank {killed} is gone: ")), "{}", left.stderr);

        bench.train(1, &run, "--recipe {}/longer.toml --resume --stop-after 4");
        let curve = bench.curve(&run);
        assert!(curve.len() >= 8, "{}", curve.len());
        let shown = curve.len().min(14);
        assert_alike(&curve[..shown], &whole[..shown], &run);
    }
}

#[test]
fn ranks_that_are_not_alike_are_refused_at_the_start() {
    let bench = Bench::new();
    bench.recipe("other.toml", &RECIPE.replace("learning_rate = 1e-3", "learning_rate = 2e-3"));
    let more = ["a fifth text that the others lack"; 5].join("\n");
    std::fs::write(bench.at("more.txt"), more).unwrap();
    bench.train(1, "trained", "--stop-after 4");
    for (second, says) in [
        ("--recipe {}/other.toml", "rank 1 has another recipe than rank 0"),
        ("--texts {}/more.txt", "rank 1 has another model size, tokenizer or data than rank 0"),
        ("--init {}/trained", "rank 1 has another checkpoint to go on from or to start from than rank 0"),
        ("--stop-after 3", "rank 1 has another end of this call (--stop-after, --resume) than rank 0"),
        ("--pairs {}/none", "rank 1 stopped: "),
    ] {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let children =
            [as_rank(bench.pretrain("refused", ""), 0, 2, port), as_rank(bench.pretrain("refused", second), 1, 2, port)];
        let runs = children.map(ended);
        for run in &runs {
            assert_eq!(run.code, 3, "{second}: {}", run.stderr);
        }
        assert!(runs[0].stderr.contains(says), "{second}: {}", runs[0].stderr);
        assert!(says.ends_with(": ") || runs[1].stderr.contains(says), "{second}: {}", runs[1].stderr);
        assert!(!bench.at("refused/log.jsonl").exists());
    }
}

#[test]
fn a_launch_that_cannot_be_is_told_in_a_sentence() {
    let bench = Bench::new();
    for (variables, says) in [
        ("RANK=0", "RANK is set and WORLD_SIZE is not"),
        ("RANK=0 WORLD_SIZE=2", "MASTER_ADDR is not"),
        ("RANK=2 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=9", "there are 2 ranks, counted from 0"),
        ("SLURM_NTASKS=4 SLURM_PROCID=0", "not started by srun"),
        ("OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2 RANK=1 WORLD_SIZE=2", "unset the variables that are not meant"),
        (
            "RANK=1 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=9 UNIMO_RANKS_TIMEOUT=1",
            "rank 0 did not come to 127.0.0.1:9 within 1 s",
        ),
        ("RANK=0 WORLD_SIZE=9 MASTER_ADDR=127.0.0.1 MASTER_PORT=9 UNIMO_RANKS_TIMEOUT=soon", "`soon`"),
    ] {
        let mut command = bench.pretrain("told", "");
        command.envs(variables.split(' ').filter_map(|pair| pair.split_once('=')));
        let run = ended(command.spawn().unwrap());
        assert_eq!((run.code, run.stderr.lines().count()), (3, 1), "{variables}: {}", run.stderr);
        assert!(run.stderr.contains(says), "{variables}: {}", run.stderr);
    }
    // What is one process says so instead of doing everything twice.
    let mut plan = Command::new(path("unimo-train"));
    plan.args("plan --config none --backbone none --pairs none --out none".split(' ')).stderr(Stdio::piped());
    plan.envs([("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "9")]);
    let run = ended(plan.spawn().unwrap());
    assert!(run.code == 3 && run.stderr.contains("`plan` is one process, and a launcher started 2"), "{}", run.stderr);
}

#[test]
fn mpirun_starts_ranks_too() {
    if Command::new("mpirun").arg("--version").output().is_err() {
        assert!(std::env::var("UNIMO_REQUIRE_MPI").is_err(), "UNIMO_REQUIRE_MPI is set, and there is no mpirun");
        println!("skipped: there is no mpirun");
        return;
    }
    let bench = Bench::new();
    bench.train(1, "one", "");
    let mut command = Command::new("mpirun");
    without_launcher(&mut command);
    // A container's only user, and fewer cores than ranks.
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.env("OMPI_MCA_rmaps_base_oversubscribe", "1");
    command.args(["-np", "2"]).arg(path("unimo-train")).args(bench.pretrain_words("mpi", ""));
    let run = ended(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap());
    assert_eq!(run.code, 0, "{}", run.stderr);
    assert_alike(&bench.curve("mpi"), &bench.curve("one"), "mpirun");
    let log = std::fs::read_to_string(bench.at("mpi/log.jsonl")).unwrap();
    assert!(log.lines().all(|line| line.contains("\"ranks\":2")), "mpirun's processes were one rank each");
}
