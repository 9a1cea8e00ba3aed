//! `unimo-train ablate`

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};

use super::pretrain::DataArgs;
use unimo_train::ablation::{Plan, ablate};
use unimo_train::model::ModelConfig;
use unimo_train::parallel::{Alone, require_one_rank};

const EXAMPLES: &str = "Examples:
  unimo-train rewrite --pairs flickr8k/train --out rewrites
  unimo-train retrieve --pairs flickr8k/train --images coco --texts captions.txt --backbone mobilenetv2.safetensors \\
      --features features --out retrieved
  unimo-train ablate --plan trainer/recipes/ablation.toml --tokenizer tokenizer.json --backbone mobilenetv2.safetensors \\
      --pairs flickr8k/train --images coco --texts captions.txt --rewrites rewrites --retrieved retrieved \\
      --dev flickr8k/dev-0000.tar --features features --out runs/ablation

Every variant is trained with every seed, in runs OUT/<variant>/seed-<n> that resume; OUT/table.md and OUT/scores.toml are written
anew after each. What has ended is not trained again: interrupt it, or add a variant to the plan, and give the same command.";

/// Train variants of a recipe with several seeds and write one table of means and spreads.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// Plan (TOML): size, seeds, the recipe, and what each variant changes
    #[arg(long, value_name = "FILE")]
    plan: PathBuf,
    #[command(flatten)]
    data: DataArgs,
}

/// Runs the subcommand.
///
/// # Errors
/// An unusable plan or data, failed writes.
pub fn run(args: &Args) -> Result<ExitCode> {
    require_one_rank("ablate")?;
    let plan = Plan::from_file(&args.plan)?;
    let first = plan.recipe_of(&plan.variants[0], plan.seeds[0])?;
    if args.data.dry_run || args.data.resume || args.data.stop_after.is_some() {
        bail!("an ablation always goes on with what is there; --dry-run, --resume and --stop-after are for single runs");
    }
    let job = args.data.job(&Alone, first, ModelConfig::named(&plan.size)?, None)?;
    print!("{}", ablate(&plan, &job, &args.data.out)?);
    Ok(ExitCode::SUCCESS)
}
