//! Models that are known by name: the configurations that their authors published, in `data/models.json`.

use serde_json::{Map, Value};

use super::{Model, config};

fn table() -> Map<String, Value> {
    serde_json::from_str(include_str!("../../data/models.json")).expect("the table in the program is JSON")
}

/// The names of the table, in its order.
pub fn names() -> Vec<String> {
    table().keys().cloned().collect()
}

/// A model of the table: `Llama-3.1-8B`, in any case, with or without the organisation before it and `-Instruct` behind it.
pub fn known(name: &str) -> Option<Model> {
    let wanted = plain(name);
    let (name, config) = table().into_iter().find(|(known, _)| plain(known) == wanted)?;
    Some(
        config::from_config(&name, "the built-in table", &config)
            .expect("configurations in the program are right"),
    )
}

fn plain(name: &str) -> String {
    let name = name.rsplit('/').next().unwrap_or(name).to_lowercase();
    let name = name.strip_prefix("meta-").unwrap_or(&name);
    let name = ["-instruct", "-it", "-chat", "-base"]
        .iter()
        .find_map(|suffix| name.strip_suffix(suffix))
        .unwrap_or(name);
    name.replace(['_', ' '], "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_found_as_people_write_them() {
        for name in
            ["Llama-3.1-8B", "llama-3.1-8b", "meta-llama/Meta-Llama-3.1-8B-Instruct", "LLAMA-3.1-8B-instruct"]
        {
            assert_eq!(known(name).map(|model| model.name).as_deref(), Some("Llama-3.1-8B"), "{name}");
        }
        assert_eq!(known("Llama-9"), None);
        assert_eq!(known(""), None);
    }

    /// Counts that the files of the published models have (the size that their pages show).
    #[test]
    fn published_counts() {
        for (name, parameters) in [
            ("SmolLM2-135M", 134_515_008),
            ("Llama-3.2-1B", 1_235_814_400),
            ("Llama-3.2-3B", 3_212_749_824),
            ("Llama-3.1-8B", 8_030_261_248),
            ("Llama-3.1-70B", 70_553_706_496),
            ("Llama-3.1-405B", 405_853_388_800),
            ("Qwen2.5-7B", 7_615_616_512),
            ("Qwen2.5-14B", 14_770_033_664),
            ("Qwen2.5-32B", 32_763_876_352),
            ("Qwen2.5-72B", 72_706_203_648),
            ("Qwen3-8B", 8_190_735_360),
            ("Qwen3-14B", 14_768_307_200),
            ("Qwen3-32B", 32_762_123_264),
            ("Qwen3-30B-A3B", 30_532_122_624),
            ("Qwen3-235B-A22B", 235_093_634_560),
            ("Mistral-7B-v0.1", 7_241_732_096),
            ("Mixtral-8x7B", 46_702_792_704),
            ("gemma-2-9b", 9_241_705_984),
            ("gemma-2-27b", 27_227_128_320),
            ("gemma-3-1b", 999_885_952),
            ("phi-4", 14_659_507_200),
            ("gpt-oss-20b", 20_914_757_184),
            ("gpt-oss-120b", 116_829_156_672),
            ("DeepSeek-V2-Lite", 15_706_484_224),
            ("DeepSeek-V3", 671_026_404_352),
        ] {
            let model = known(name).unwrap_or_else(|| panic!("{name} is not in the table"));
            assert_eq!(model.parameters(), parameters, "{name}");
        }
        assert_eq!(names().len(), 25);
    }
}
