"""The table of bad commands: what is typed, and what the line of the error must say.

``{place}`` is the folder that :func:`tests.test_bad_input.place` fills.
"""

from __future__ import annotations

COMMANDS: list[tuple[str, tuple[str, ...]]] = [
    # What typer reads.
    ("", ()),  # the help, not an error: see the test
    ("train --sparsity head=0.5", ("sparsity is given for head", "recipe mlp has none", "give one number")),
    ("train --recipe gpt --width 100", ("width is 100", "a multiple of 64")),
    ("train --depth 2", ("depth is 2", "recipe mlp has no such options", "drop it")),
    ("train --sparsity lots", ("sparsity is 'lots'", "it must be a number such as 0.9", "mlp=0.9")),
    # Options of a run.
    ("train --sparsity 90", ("sparsity is 90", "did you mean 0.9?")),
    ("train --sparsity 0.999 --width 32", ("sparsity", "lower the sparsity or use smaller blocks")),
    ("train --method rigll", ("method is 'rigll'", "one of static, set")),
    ("train --epochs 0", ("epochs is 0", "1 or more")),
    ("train --drop-fraction 2", ("drop_fraction is 2", "[0, 1]")),
    ("train --method static --drop-fraction 0.3", ("drop_fraction", "static")),
    (
        "train --sparsity 0.999 --transform wide",
        ("sparsity is 0.999", "31.6 times as wide", "GiB", "option --transform-max-gib"),
    ),
    (
        "train --score snip --transform wide",
        ("score is snip, but transform draws the blocks", "drop the option"),
    ),
    ("train --score snip --method gradual", ("score is snip, but method gradual begins with all blocks",)),
    ("train --score snipp", ("score is 'snipp'; it must be one of magnitude, random, snip",)),
    ("train --recipe gpt --score synflow", ("score is synflow", "an input of ones, which the tokens of recipe gpt")),
    ("train --no-sparse --score snip", ("score would change nothing: only the dense twin is trained",)),
    ("plan --score snip", ("score is on, of which no plan is made; drop the option",)),
    (
        "train --paper gse-cifar10-resnet56-97",
        ("paper is 'gse-cifar10-resnet56-97'", "did you mean gse-cifar10-resnet56-9", "--list shows all"),
    ),
    ("train --paper gse-cifar10-resnet56-98", ("data is missing", "trains on CIFAR-10; give it", "option --data")),
    (
        "train --paper gse-cifar10-resnet56-98 --recipe mlp --data {place}/small.npz",
        ("recipe is mlp, but paper gse-cifar10-resnet56-98 trains resnet56-gse; drop one",),
    ),
    (
        "train --paper rigl-cifar10-wrn22-90 --method set --preset rigl --data {place}/small.npz",
        ("preset is 'rigl', whose method is rigl, but method is 'set'",),
    ),
    ("train --transform-max-gib 3", ("transform_max_gib is 3", "transform is off", "drop the option")),
    ("train --agent --agent-gamma 7", ("gamma is 7", "[0, 1]", "option --agent-gamma")),
    ("train --agent --agent-batches 0", ("batches is 0", "1 or more", "option --agent-batches")),
    ("train --agent --agent-every 5", ("every is 5", "estimate must be gradients", "option --agent-every")),
    (
        "train --agent --agent-estimate guess",
        ("estimate is 'guess'", "one of losses, gradients", "option --agent-estimate"),
    ),
    (
        "train --method gse --subset-factor 0",
        ("subset_factor is 0.0; it must be a number above 0 (option --subset-factor)",),
    ),
    ("compare --method set:masks=3 --out {place}/new", ("masks is 3, but method set has no such option",)),
    ("compare --preset gsee --out {place}/new", ("preset is 'gsee'; it must be one of set-mocanu, set-rigl",)),
    ("compare --sparsity 90 --out {place}/new", ("sparsity is 90.0; it is the fraction absent",)),
    ("compare --block-size 1 --out {place}/new", ("rigl-s0.9-b1: 'hidden1' has 1x1 blocks",)),
    ("compare --seeds 0 --out {place}/new", ("seeds is 0",)),
    # A race.
    ("bench --linear 10", ("linear is '10'", "INxOUT such as 1024x4096")),
    ("bench --threads 4096", ("threads is '4096'", "the cores that there are")),
    ("bench --model resnet200", ("model is 'resnet200'", "module:function, or one of the recipes")),
    ("bench --model {place}:build", ("{place}:build", "which fails with ModuleNotFoundError")),
    ("bench --picture {place}/a.bmp", ("a.bmp", "the name must end in .png, .svg, .pdf")),
    ("bench --picture {place}/none/a.png", ("whose folder does not exist", "make the folder")),
    # Where it writes.
    ("train --width 64 --out {place}/full", ("out is {place}/full", "not empty", "choose another --out")),
    ("train --width 64 --out {place}/run", ("not empty", "--resume")),
    ("train --width 64 --out {place}/notes.txt", ("the folder {place}/notes.txt cannot be written", "choose another")),
    ("train --width 64 --out {place}/notes.txt/run", ("cannot be written", "choose another")),
    ("train --width 64 --out /proc/nowhere", ("/proc/nowhere cannot be written", "choose another")),
    ("train --width 64 --out {place}/" + 300 * "x", ("cannot be written", "name too long")),
    # The data.
    ("train --data {place}/none.npz", ("data is {place}/none.npz", "does not exist", "give")),
    ("train --data {place}/notes.txt", ("notes.txt", "does not end in .npz", "give")),
    ("train --data {place}/text.npz", ("text.npz", "damaged or no .npz", "numpy.savez")),
    ("train --data {place}/nothing-to-test.npz", ("empty test set", "at least one")),
    ("train --data {place}/inf.npz", ("test_images", "float64", "must be uint8")),
    ("train --data {place}/full", ("full", "IDX files")),
    ("train --data {place}/small.npz --recipe vgg16", ("8 x 8", "vgg16 needs 32 x 32")),
    ("train --data {place}/broken.tar.gz", ("broken.tar.gz",)),
    ("train --data {place}/ä b.npz", ("ä b.npz", "1 class only")),
    (
        "train --rate 1e30 --width 32 --sparsity 0.5 --epochs 1 --seeds 1 --batch-size 700",
        ("NaN", "lower the learning"),
    ),
    # Going on, and the page.
    ("train --resume {place}/none", ("resume is {place}/none", "no config.json", "give the folder of a run")),
    ("train --resume {place}/full", ("has no config.json", "give the folder of a run")),
    ("train --resume {place}/junk", ("config.json", "damaged", "start a new run")),
    ("train --resume {place}/newer", ("format version 99", "use the version of sparsekern")),
    (
        "train --resume {place}/first-format",
        ("has format version 1", "use the version", "start a new run"),
    ),
    ("train --resume {place}/cut-results", ("results.json is damaged", "delete it and resume the run")),
    ("report {place}/cut-results", ("results.json is damaged", "delete it and resume the run")),
    (
        "report {place}/odd-data",
        ("config.json is damaged: data: input should be a valid dictionary", "start a new run"),
    ),
    ("compare --out {place}/no-plan", ("no-plan/plan.json is damaged", "choose another --out")),
    ("train --resume {place}/grid", ("which is a comparison", "such as {place}/grid/set", "sparsekern compare --out")),
    ("report {place}/grid", ("run is {place}/grid", "which is a comparison", "give one of the runs")),
    ("inspect {place}/grid", ("the source is {place}/grid", "which is a comparison", "give one of the runs")),
    ("inspect {place}/full", ("the source is {place}/full", "no config.json", "give a file of weights")),
    ("inspect {place}/run", ("seed is 0", "no checkpoint", "those that have one: none")),
    ("inspect {place}/notes.txt", ("notes.txt", "neither a safetensors file nor one of torch.save", "give a file")),
    ("compare --out {place}/notes.txt", ("out is {place}/notes.txt", "which is a file", "choose")),
    ("compare --out {place}/run", ("out is {place}/run", "holds no comparison", "choose another --out")),
    ("compare --method rigl:agent=maybe --out {place}/new", ("agent is 'maybe'", "true or false")),
    ("convert {place}/none {place}/x.pt --to dense", ("{place}/none does not exist", "give a file of weights")),
    (
        "convert {place}/w.safetensors /proc/x.safetensors --to dense",
        ("/proc/x.safetensors cannot", "No such", "choose"),
    ),
    (
        "convert {place}/w.safetensors {place}/x.pt --to sparse --sparsity 0.5 --block-size 99",
        ("block_size is 99x99", "larger than layer 'fc'", "choose smaller"),
    ),
    (
        "convert {place}/w.safetensors {place}/full.pt --to dense",
        ("full.pt, which is a folder", "give the name of a file"),
    ),
    ("train --resume {place}/odd", ("config.json", "start a new run")),
    ("train --resume {place}/run --epochs 7", ("epochs is 7", "drop the option")),
    ("train --resume {place}/run --out {place}/other", ("--out is {place}/other", "drop --out")),
    ("train --resume {place}/moved", ("the data of {place}/moved have changed", "restore them")),
    ("train --resume {place}/run/config.json", ("has no config.json", "give the folder")),
    ("report {place}/none", ("run is {place}/none", "no config.json", "give the folder of a run")),
    ("report {place}/junk", ("config.json", "damaged")),
    ("report {place}/newer", ("format version 99",)),
    ("report {place}/run --out {place}/notes.txt", ("notes.txt", "no page of sparsekern", "choose another --out")),
    ("report {place}/run --out {place}", ("which is a folder", "name of a file")),
    ("report {place}/run --out {place}/no/page.html", ("folder does not exist", "make the folder")),
    ("report {place}/cut-metrics", ("metrics.jsonl, line 1 is damaged", "remove the line")),
]
