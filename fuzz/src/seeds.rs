//! Inputs made by hand, one or more for each kind of thing that a target reads: where fuzzing starts from.

use engine::control::protocol::{Reply, Request, VERSION};
use engine::format::{MemberEntry, Superblock};
use engine::tensors::{Dtype, TensorInfo, npy_header};
use engine::{ErrorKind, MemberKind, WriterOptions};

/// Seeds of a target; none where there is no such target.
pub fn seeds(target: &str) -> Vec<Vec<u8>> {
    match target {
        "superblock" => superblocks(),
        "catalog_records" => vec![tree()],
        "layout" => vec![[&[2, 1][..], &layout_fields()].concat(), raw_layout()],
        "catalog_image" => {
            [0, 1, 2, 3].into_iter().map(|flags| image(flags, &[])).chain([damaged(0), damaged(1)]).collect()
        }
        "pool" => (0..4).map(|flags| [&[flags][..], &tree()].concat()).collect(),
        "safetensors" => safetensors(),
        "gguf" => gguf(),
        "npy" => npy(),
        "names" => names(),
        "control_frames" => frames(),
        "control_server" => {
            vec![server(1), server(0x81), [&[1, 255][..], &5u16.to_le_bytes(), b"hello"].concat()]
        }
        "control_client" => client(),
        "job_file" => JOB_FILES.iter().map(|text| text.as_bytes().to_vec()).collect(),
        "bench_arguments" => BENCH_LINES.iter().map(|line| line.replace(' ', "\0").into_bytes()).collect(),
        "command_line" => COMMAND_LINES.iter().map(|line| line.replace(' ', "\0").into_bytes()).collect(),
        "config" => CONFIGS.iter().map(|text| text.as_bytes().to_vec()).collect(),
        "kernel_tables" => kernel_tables(),
        "kv_records" => vec![engine::fuzzing::kv_seed()],
        "kv_store" => [[0, 1, 5], [0, 2, 5], [0, 3, 4], [1, 0, 0]]
            .into_iter()
            .map(|head| [&head[..], &engine::fuzzing::kv_seed()].concat())
            .collect(),
        _ => Vec::new(),
    }
}

fn superblocks() -> Vec<Vec<u8>> {
    let member =
        |id: u8, kind, path: &str| MemberEntry { id: [id; 16], kind, bytes: 1 << 40, path: path.into() };
    let raw = Superblock {
        pool: [7; 16],
        index: 1,
        chunk_size: 16 << 10,
        stripe_unit: 1 << 20,
        created: 1_790_000_000,
        sequence: 3,
        catalog_offset: 1 << 20,
        catalog_len: 16 << 20,
        data_offset: 17 << 20,
        data_len: 1 << 30,
        members: vec![
            member(1, MemberKind::Directory, "/srv/a"),
            member(2, MemberKind::Block, "/dev/nvme0n1"),
            member(3, MemberKind::Image, ""),
        ],
        own_path: "/somewhere".into(),
    };
    let one = Superblock {
        index: 0,
        members: vec![member(1, MemberKind::Directory, "/srv/pool")],
        catalog_offset: 0,
        catalog_len: 0,
        data_offset: 0,
        data_len: 0,
        ..raw.clone()
    };
    let older = Superblock { sequence: 2, ..raw.clone() };
    let encode = |superblock: &Superblock| superblock.encode().expect("it fits").to_vec();
    vec![encode(&one), [encode(&raw), encode(&older)].concat(), [encode(&raw)[..300].to_vec()].concat()]
}

/// A plan (see `catalog.rs`): root, a directory, two regions with layouts, a link, a device, attributes.
fn tree() -> Vec<u8> {
    let mut out = Vec::new();
    number(&mut out, 20);
    number(&mut out, 9);
    number(&mut out, 5);
    let node =
        |out: &mut Vec<u8>, id: u8, kind: u8, flags: u8, nlink: u8, size: u64, file: u8, target: &[u8]| {
            out.extend([0, id, kind, flags]);
            out.extend(0o755u16.to_le_bytes());
            out.extend([nlink, 0]);
            number(out, size);
            number(out, size.next_multiple_of(4096));
            out.extend([3, file, 0]);
            number(out, 1_790_000_000);
            out.extend(5u32.to_le_bytes());
            bytes(out, target);
        };
    node(&mut out, 1, 1, 0, 3, 0, 0, b"");
    node(&mut out, 2, 1, 0, 2, 0, 0, b"");
    node(&mut out, 3, 2, 1, 1, 9000, 1, b"");
    node(&mut out, 4, 2, 0, 2, 18_000, 2, b"");
    node(&mut out, 5, 3, 0, 1, 3, 0, b"r/x");
    node(&mut out, 6, 6, 0, 1, 0, 0, b"");
    for (parent, kind, id, name) in [
        (1, 1, 2, &b"dir"[..]),
        (1, 2, 3, b"a.safetensors"),
        (2, 2, 4, b"b.bin"),
        (1, 2, 4, b"b2.bin"),
        (2, 3, 5, b"link"),
        (1, 6, 6, b"null"),
    ] {
        out.extend([3, parent, kind, id]);
        bytes(&mut out, name);
    }
    out.extend([5, 3]);
    bytes(&mut out, b"user.note");
    bytes(&mut out, b"value");
    out.extend([6, 3]);
    out.extend(layout_fields());
    out
}

/// Size, generation, chunk 16 KiB, one extent, sums of one chunk.
fn layout_fields() -> Vec<u8> {
    let mut out = Vec::new();
    number(&mut out, 9000);
    number(&mut out, 3);
    out.extend([14, 2, 0]);
    for (gap, len, offset) in [(0, 1, 0), (3, 2, 1)] {
        number(&mut out, gap);
        number(&mut out, len);
        out.extend([0, 0, 0]);
        number(&mut out, offset);
    }
    out.extend([1, 1, 1, 2, 3, 4]);
    out
}

fn raw_layout() -> Vec<u8> {
    let mut out = vec![2, 0];
    let head = [
        &100u64.to_le_bytes()[..],
        &1u64.to_le_bytes(),
        &4096u32.to_le_bytes(),
        &1u32.to_le_bytes(),
        &0u32.to_le_bytes(),
    ]
    .concat();
    for (part, index, kind, body) in [(0, 0, 0, &head[..]), (1, 0, 1, &[0, 0x80, 0x20, 0, 1, 0][..])] {
        out.extend([part, index, kind]);
        bytes(&mut out, body);
    }
    out
}

fn image(flags: u8, edits: &[u8]) -> Vec<u8> {
    let mut out = vec![flags];
    bytes(&mut out, &tree());
    out.extend(edits);
    out
}

fn damaged(flags: u8) -> Vec<u8> {
    let edit = |near: u8, at: u32, value: u8| [&[near][..], &at.to_le_bytes(), &[value]].concat();
    image(flags, &[edit(2, 9, 3), edit(1, 70_000, 9), edit(5, 4096, 0)].concat())
}

fn safetensors() -> Vec<Vec<u8>> {
    let file = |json: &str, data: usize| {
        [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &vec![1; data]].concat()
    };
    vec![
        file(
            r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"BF16","shape":[4],"data_offsets":[16,24]}}"#,
            24,
        ),
        file(
            r#"{"x/..":{"shape":[0,3],"dtype":"I64","data_offsets":[4,4],"more":[{"a":null}]},"\u0079":{"dtype":"F8_E4M3","shape":[],"data_offsets":[0,1]},"z":{"dtype":"F4","shape":[6],"data_offsets":[1,4]}}  "#,
            4,
        ),
        file("{}", 0),
    ]
}

fn gguf() -> Vec<Vec<u8>> {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let value = |key: &str, kind: u32, raw: &[u8]| [&text(key)[..], &kind.to_le_bytes(), raw].concat();
    let tensor = |name: &str, dimensions: &[u64], kind: u32, offset: u64| {
        let lengths: Vec<u8> = dimensions.iter().flat_map(|d| d.to_le_bytes()).collect();
        [
            &text(name)[..],
            &(dimensions.len() as u32).to_le_bytes(),
            &lengths,
            &kind.to_le_bytes(),
            &offset.to_le_bytes(),
        ]
        .concat()
    };
    let strings = [&8u32.to_le_bytes()[..], &2u64.to_le_bytes(), &text("a"), &text("bc")].concat();
    let nested = [
        &9u32.to_le_bytes()[..],
        &1u64.to_le_bytes(),
        &5u32.to_le_bytes(),
        &1u64.to_le_bytes(),
        &[9, 0, 0, 0],
    ]
    .concat();
    let mut out = [&b"GGUF"[..], &3u32.to_le_bytes(), &2u64.to_le_bytes(), &6u64.to_le_bytes()].concat();
    for part in [
        value("general.architecture", 8, &text("llama")),
        value("general.alignment", 4, &32u32.to_le_bytes()),
        value("tokens", 9, &strings),
        value("nested", 9, &nested),
        value("f", 12, &1.5f64.to_le_bytes()),
        value("b", 7, &[1]),
        tensor("w", &[64, 2], 2, 0),
        tensor("n", &[4], 0, 96),
    ] {
        out.extend(part);
    }
    out.resize(out.len().next_multiple_of(32) + 112, 0);
    let two = [&b"GGUF"[..], &2u32.to_le_bytes(), &0u64.to_le_bytes(), &0u64.to_le_bytes()].concat();
    vec![out, two]
}

fn npy() -> Vec<Vec<u8>> {
    let v1 = [
        &b"\x93NUMPY\x01\0\x3e\0{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }  \n"[..],
        &[0; 24],
    ]
    .concat();
    let v2 = [
        &b"\x93NUMPY\x02\0\x3e\0\0\0{'shape': (3,), \"fortran_order\": True, 'descr': '|b1'}          \n"[..],
        &[0; 24],
    ]
    .concat();
    let info = TensorInfo { name: "x".into(), dtype: Dtype::BF16, shape: vec![4, 1], data_offsets: (0, 8) };
    let view = [npy_header(&info).expect("a header"), vec![0; 8]].concat();
    vec![v1, v2, view[..4000].to_vec(), view[..200].to_vec()]
}

fn names() -> Vec<Vec<u8>> {
    [
        "model.layers.0.q_proj.weight",
        "a%2Fb",
        "%2E.",
        "%",
        "../../etc/passwd",
        "gr\u{f6}\u{df}e",
        "a//b/./c",
        ".nvtier-partial/x",
        ".tensors",
        "x.GGUF",
        "\u{1b}[31m",
    ]
    .iter()
    .map(|name| name.as_bytes().to_vec())
    .chain([
        vec![b'x'; 300],
        "\u{fc}".repeat(200).into_bytes(),
        [&1000u64.to_le_bytes()[..], &[4], b"etag", b"1000 etag"].concat(),
        b"a\xff\xfe".to_vec(),
    ])
    .collect()
}

fn frame(message: &impl serde::Serialize, payload: &[u8]) -> Vec<u8> {
    let json = serde_json::to_vec(message).expect("JSON");
    [&(json.len() as u32).to_le_bytes()[..], &(payload.len() as u32).to_le_bytes(), &json, payload].concat()
}

fn frames() -> Vec<Vec<u8>> {
    let path = || "a/b".to_owned();
    let requests = [
        Request::Hello { version: VERSION },
        Request::List { path: path(), recursive: true },
        Request::Rename { from: path(), to: path() },
        Request::OpenReader { path: path() },
        Request::Sums { first: 1, count: 2 },
        Request::OpenWriter { path: path(), size_hint: Some(1), options: WriterOptions::default() },
        Request::Wrote { offset: 1, len: 2 },
        Request::Commit,
    ];
    let replies = [
        Reply::Hello { version: VERSION, pid: 3, pool: path() },
        Reply::Done,
        Reply::Entries { entries: Vec::new(), more: false },
        Reply::Working(None),
        Reply::Reader { size: 5, chunk_size: 16384, direct: true },
        Reply::Writer { resume_offset: 5, direct: false },
        Reply::Error { kind: ErrorKind::NoSpace, message: path() },
    ];
    let mut all: Vec<Vec<u8>> = vec![
        requests.iter().flat_map(|request| frame(request, &[])).collect(),
        replies.iter().flat_map(|reply| frame(reply, b"payload")).collect(),
        b"{\"op\":\"sync\"}\0payload".to_vec(),
    ];
    all.extend(requests.iter().map(|request| serde_json::to_vec(request).expect("JSON")));
    all.extend(replies.iter().map(|reply| serde_json::to_vec(reply).expect("JSON")));
    all
}

/// Hello, stat of `r`, a reader with reads and sums, a writer with a write and a commit, a listing.
fn server(start: u8) -> Vec<u8> {
    let mut out = vec![start];
    out.extend([0, 4, 0, 0, 10, 0, 0, 11]);
    number(&mut out, 16);
    number(&mut out, 1000);
    out.extend([0, 13]);
    number(&mut out, 0);
    number(&mut out, 9);
    out.extend([0, 15]);
    out.extend(0o600u16.to_le_bytes());
    out.extend([0, 3, 1, 3, 0, 16]);
    number(&mut out, 0);
    bytes(&mut out, b"some bytes");
    out.extend([0, 18, 0, 19, 0, 3, 5, 0, 0, 8, 5, 0, 9]);
    out
}

fn client() -> Vec<Vec<u8>> {
    let reader = |direct: u8, size: u64, chunk: u64| {
        let mut out = vec![3, if direct == 0 { 0x80 | 10 } else { 10 }];
        if direct == 0 {
            out.extend(5000u16.to_le_bytes());
        }
        number(&mut out, size);
        number(&mut out, chunk);
        out.extend([direct, 7]);
        bytes(&mut out, &[1; 40]);
        out.push(7);
        bytes(&mut out, &[2; 9]);
        out
    };
    vec![
        reader(0, 5000, 4096),
        reader(1, 30, 4096),
        reader(0, u64::MAX, u64::from(u32::MAX)),
        vec![0, 13, 0, 14, 13, 1],
        vec![2, 9],
        vec![5, 12, 0, 5, 1, 9, 9, 9],
        [&[1, 15, 2, 0][..], b"no"].concat(),
    ]
}

const JOB_FILES: &[&str] = &[
    "[global]\nbs=4k\ndirect=1\n; comment\n[a]\nrw=randread\nfilename=/x:/y\\:z\nsize=25%\n[b]\nrw=write # inline\nsize=1m\nverify=crc32c\n",
    "[j]\nrw=randrw\nrwmixread=70\niodepth=8\nrate=10m,1m\nruntime=5s\ntime_based\npercentile_list=50:99.9\ncpus_allowed=0,2-3\nsize=1g\nnumjobs=2\n",
    "[p]\nprofile=model-load\nfilename=/m\n[q]\nprofile=kv-restore\nfilename=/m\nioengine=null\n",
    "[s]\nioengine=pool\npool=/p\nbs=0x1000,64Ki\nkb_base=1000\noffset=1ti\n",
];

const BENCH_LINES: &[&str] = &[
    "--name=a --rw=read --filename=/x --bs 4k --size=1m --direct=1",
    "--name=global --bs=8k --name=a --rw randwrite --size=1g --output-format=json,terse --eta=never --ceiling=3g",
    "--cmdhelp=bs",
    "--enghelp --version",
    "--parse-only --readonly --name=x --rw=randrw --rwmixwrite=30 --iodepth=4 --iodepth_batch_complete_min=2 --size=10%",
];

const COMMAND_LINES: &[&str] = &[
    "import --pool /p a.safetensors model --json",
    "mount /p /m --ram 8GiB --threads 4 -vv",
    "format /p --size 10GB --raw",
    "ls --pool /p -r a/b",
    "export --pool /p a b --progress always",
    "verify --pool /p",
    "bench --name=x --rw=read",
    "completions bash",
];

const CONFIGS: &[&str] = &[
    "pool = '/p'\n[mount]\nram = '8GiB'\nverify = 'always'\nthreads = 3\nallow_other = true\n[import]\nconnections = 4",
    "pool = \"/q\"\n[import]\nconnections = 0\n",
    "poool = 1\n 10GB 512M 4096 8gib 18446744073709551615 17179869184G",
];

fn kernel_tables() -> Vec<Vec<u8>> {
    let mut block = vec![b'N', b'V', b'B', b'V', 1, 0, 0, 0];
    block.resize(64, 3);
    vec![
        b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n99 35 0:51 / /mnt/a\\040b rw,nosuid - fuse.nvtier /srv/pool\\134x rw,user_id=0\nbroken line\n".to_vec(),
        b" 254 0 vda 10 1 80 5 20 2 160 7 0 9 12 0 0 0 0 0 0\n 7 0 loop0 0 0 0\n".to_vec(),
        [&[0][..], &4096u64.to_le_bytes(), &block].concat(),
    ]
}

/// As `Source::number` reads it.
fn number(out: &mut Vec<u8>, value: u64) {
    match value {
        0..=0xff => out.extend([0, value as u8]),
        0x100..=0xffff => {
            out.push(1);
            out.extend((value as u16).to_le_bytes());
        }
        0x1_0000..=0xffff_ffff => {
            out.push(2);
            out.extend((value as u32).to_le_bytes());
        }
        _ => {
            out.push(3);
            out.extend(value.to_le_bytes());
        }
    }
}

/// As `Source::bytes` reads them.
fn bytes(out: &mut Vec<u8>, value: &[u8]) {
    out.extend((value.len() as u16).to_le_bytes());
    out.extend(value);
}
