//! What the README shows is what the programs print.

use std::path::Path;

use unimo_tests::program;

/// Commands of the README's code blocks (`$ …`), each with the lines printed under it.
fn shown(readme: &str) -> Vec<(String, Vec<String>)> {
    let mut commands: Vec<(String, Vec<String>)> = Vec::new();
    // Every other piece between fences is a code block.
    for block in readme.split("```").skip(1).step_by(2) {
        let mut of_block: Vec<(String, Vec<String>)> = Vec::new();
        for line in block.lines() {
            match (line.strip_prefix("$ "), of_block.last_mut()) {
                (Some(command), _) => of_block.push((command.to_owned(), Vec::new())),
                (None, Some((_, printed))) => printed.push(line.to_owned()),
                (None, None) => {}
            }
        }
        commands.extend(of_block);
    }
    commands.retain(|(_, printed)| !printed.is_empty());
    commands
}

/// Whether lines are the same, but for the last digit of a score that they begin with: processors round differently.
fn alike(found: &[String], shown: &[String]) -> bool {
    let score = |line: &str| line.split_once(' ').and_then(|(score, rest)| Some((score.parse::<f64>().ok()?, rest.to_owned())));
    found.len() == shown.len()
        && found.iter().zip(shown).all(|(a, b)| match (score(a), score(b)) {
            (Some((a, found)), Some((b, shown))) => (a - b).abs() < 0.0025 && found == shown,
            _ => a == b,
        })
}

#[test]
fn the_readmes_commands_print_what_it_shows() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().canonicalize().unwrap();
    let readme = std::fs::read_to_string(root.join("README.md")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let gallery = folder.path().join("pictures.gallery").display().to_string();
    let commands = shown(&readme);
    let starts = ["cargo run --release -- caption ", "unimo index add ", "unimo search "];
    assert_eq!(commands.len(), starts.len(), "{commands:?}");
    for ((command, printed), start) in commands.iter().zip(starts) {
        assert!(command.starts_with(start), "{command} is not {start}…");
        let bare = command.trim_start_matches("cargo run --release -- ").trim_start_matches("unimo ");
        // The README speaks from the repository's root; quotation marks hold words together.
        let words = bare.split('"').enumerate().flat_map(|(i, part)| match i % 2 {
            1 => vec![part.to_owned()],
            _ => part.split_whitespace().map(str::to_owned).collect(),
        });
        let arguments: Vec<String> = words
            .map(|word| match word.as_str() {
                "pictures.gallery" => gallery.clone(),
                path if path.starts_with("runtime/") => root.join(path).display().to_string(),
                _ => word,
            })
            .collect();
        let run = program("unimo", &arguments.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(run.code, 0, "{command}\n{}", run.stderr);
        let lines: Vec<String> = run.stdout.lines().map(|line| line.replace(&root.display().to_string(), "…")).collect();
        assert!(alike(&lines, printed), "{command}\nprints {lines:#?}\nthe README shows {printed:#?}");
    }
}
