"""The mistakes of `make mutants`, by file: `(old, new, tests)`.

`old` stands in the file once; with `new` in its place, one of `tests` must fail: names of pytest under `tests/`,
as few as notice, with ", " between them. What changes nothing (another order of a sum, a bound that is never met) is no
mistake, and does not belong here.
"""

TORCH = "pipeline/test_against_torch.py"
STEP = "pipeline/test_step.py"
TRAIN = "pipeline/test_train.py"
KILLED = f"{TRAIN}::test_a_killed_run_continues_with_bit_identical_losses"
SPLIT = "pipeline/test_parallel.py::test_a_divided_run_is_the_run_of_one_process"
BATCHES = "pipeline/data/test_batches.py"
SCHEDULE = "pipeline/data/test_schedule.py"
ORDER = "pipeline/data/test_order.py"
PACKING = "pipeline/data/test_packing.py"
SAMPLES = "pipeline/data/test_samples.py"
TEMPLATES = "pipeline/data/test_templates.py"
CHECKPOINT = "pipeline/checkpoint/test_checkpoint.py"
OWNED = "pipeline/checkpoint/test_owned.py"
INTEGRITY = "pipeline/checkpoint/test_integrity.py::test_every_process_learns_what_any_of_them_found[1]"
FAKE_GPU = "benchmarks/test_fake_gpu.py"
WAITS = f"{FAKE_GPU}::test_the_host_waits_once_a_step_and_before_the_update"
ACTIVATIONS = f"{FAKE_GPU}::test_activations_are_those_of_the_formula"
ORDER_OF_RANKS = f"{FAKE_GPU}::test_processes_of_a_group_call_the_same_collectives_in_the_same_order"
FP8 = "benchmarks/test_fake_gpu_fp8.py"
ROOFLINE = "benchmarks/test_roofline.py"
GPU_REPORT = "benchmarks/test_gpu_report.py"
PHASES = "pipeline/test_phases.py"
SUMS = f"{FAKE_GPU}::test_gradients_are_summed_during_the_backward_pass_and_weights_collected_after_the_update"
SHARD_SET = "pipeline/shards/test_shard_set.py"
DAMAGE = "pipeline/shards/test_stream_damage.py"
SAISA = "model/test_saisa.py"
FAMILY, HF_FAMILY = "model/test_family.py", "model/test_hf_family.py"
FLAMINGO = "model/test_flamingo.py"
FAMILY_RUNS = "pipeline/test_family.py::test_a_divided_run_is_the_run_of_one_process"
FAMILY_RUN = f"{FAMILY_RUNS}[llava pretrain PP2 interleaved]"
HF_FORWARD = "model/test_hf_forward.py"
HF_GENERATION = "model/test_hf_generation.py"
CONTRIBUTION = "pipeline/evaluation/test_contribution.py"
PLAN = "data_prep/test_plan.py"
SHARD_TASK = "data_prep/test_shard_task.py"
LISTINGS = "data_prep/test_verify.py::test_one_flipped_bit_anywhere_in_a_listing_names_it"
VERIFY = "data_prep/test_verify.py::test_damage_is_named_and_the_advice_repairs_it"

MUTANTS: dict[str, list[tuple[str, str, str]]] = {
    "benchmarks/roofline.py": [
        ('(2 if event.name == "allreduce" else 1)', "1", ROOFLINE),
        ('chip.attention_flops["backward" in event.name]', "chip.attention_flops[0]", ROOFLINE),
        ("num_idle / num_turns * passes", "num_idle / num_turns", ROOFLINE),
        ("* load.num_samples / num_processes", "* load.num_samples", ROOFLINE),
        ("event.num_bytes / chip.memory_bytes, chip.launch_seconds)", "chip.launch_seconds)", ROOFLINE),
    ],
    "benchmarks/gpu_report/runner.py": [
        ("process.kill()\n", "pass\n", f"{GPU_REPORT}::test_what_is_cut_or_crashes_loses_nothing_else"),
        ("if limit < 1:", "if False:", f"{GPU_REPORT}::test_what_is_cut_or_crashes_loses_nothing_else"),
    ],
    "benchmarks/gpu_report/parts.py": [
        (
            "all(difference <= allowed for difference in differences)",
            "max(differences) <= allowed",
            f"{GPU_REPORT}::test_losses_that_are_far_from_the_cpus_fail_their_part",
        ),
        (
            "if WAIT in str(",
            "if str(",
            f"{GPU_REPORT}::test_a_step_of_which_torch_says_that_it_waits_elsewhere_is_seen",
        ),
    ],
    "benchmarks/gpu_report/outcomes.py": [
        (
            "if report.failed and not self.failure:",
            "if report.failed:",
            f"{GPU_REPORT}::test_a_test_is_a_row_with_its_first_failure",
        ),
    ],
    "benchmarks/gpu_report/tables.py": [
        (
            "if abs(value) >= 100 else",
            "if True else",
            f"{GPU_REPORT}::test_rows_become_a_table_with_a_column_for_each_name",
        ),
        ('.replace("|", "/")', "", f"{GPU_REPORT}::test_rows_become_a_table_with_a_column_for_each_name"),
    ],
    "pipeline/optimizer.py": [
        (
            "if is_float8tensor(self.parameter)",
            "if False",
            "pipeline/test_optimizer.py::test_the_weight_of_a_range_is_the_optimizers_where_the_model_has_it_in_8_bits",
        ),
        ("adam_beta1=optim.adam_beta1", "adam_beta1=0.9", TORCH),
        ("adam_beta2=optim.adam_beta2", "adam_beta2=0.999", TORCH),
        ("adam_eps=optim.adam_epsilon", "adam_eps=1e-8", TORCH),
        ("weight_decay=optim.weight_decay", "weight_decay=0.0", TORCH),
        ("clip_grad=optim.clip_grad_norm", "clip_grad=0.0", TORCH),
        ("math.ceil(num_steps", "math.floor(num_steps", TORCH),
        ("optim.learning_rate * step / num_warmup", "optim.learning_rate", TORCH),
        ("math.cos(math.pi * progress)", "math.cos(progress)", TORCH),
        ('or "projector." in name', "or True", TORCH),
        ('["step"] = torch.tensor(float(count))', '["step"] = torch.tensor(0.0)', KILLED),
    ],
    "pipeline/step.py": [
        ('group["lr"] = rate', "pass", TORCH),
        ("loss = outcome.loss_sum / planned", "loss = outcome.loss_sum / batch.counts.num_samples", TORCH),
        ("return total / num_planned,", "return total,", TORCH),
        ("if outcome.num_targets != planned:", "if False:", STEP),
        ("total = losses.sum()", "total = losses.mean()", TORCH),
        ("state.source.image_processor.normalize(", "torch.Tensor.float(", STEP),
        ("rows_of_pack(part,", "rows_of_pack(part.flip(0),", STEP),
        (" + batch.counts.num_images * state.flops_per_image", "", STEP),
        ("- started + wait_seconds", "- started", STEP),
        ("bool(sums) and state.groups.tp.rank() == 0", "bool(sums)", f"{SPLIT}[pretrain-TP2]"),
        # Waits for the GPU: a copy from here, one to here, one out of pageable memory; and what one process leaves out.
        ("return torch.full((), value, dtype", "return torch.tensor(value, dtype", f"{WAITS}[stage 2]"),
        ("total = losses.sum()\n", "total = losses.sum()\n    assert total.item() > 0\n", f"{WAITS}[stage 2]"),
        ("pixels_B3HW.to(state.device, non_blocking=True)", "pixels_B3HW.to(state.device)", f"{WAITS}[stage 2]"),
        (
            "    torch.distributed.all_reduce(values)\n    return values",
            "    if is_last:\n        torch.distributed.all_reduce(values)\n    return values",
            ORDER_OF_RANKS,
        ),
        ("number(state.is_writing)", "number(0)", f"{TRAIN}::test_checkpoints_written_in_the_background_are_the_same"),
        ("torch.distributed.all_reduce(values)", "pass", f"{SPLIT}[pretrain-DP2]"),
        (
            "if not math.isfinite(loss):",
            "if False:",
            f"{TRAIN}::test_what_is_not_finite_stops_before_the_optimizer_steps[loss]",
        ),
        (
            "if not math.isfinite(outcome.grad_norm):",
            "if False:",
            f"{TRAIN}::test_what_is_not_finite_stops_before_the_optimizer_steps[gradient norm]",
        ),
    ],
    "pipeline/replicas.py": [
        ("parallel.overlap_grad_reduce and stage.stage.is_first", "False", SUMS),
        ("in reversed(chunk.bucket_groups):", "in chunk.bucket_groups:", SUMS),
        ("else no_sync[0]", "else None", f"{SPLIT}[pretrain-DP2]"),
        ("grad_reduce_in_fp32=not parallel.reduce_in_bf16", "grad_reduce_in_fp32=False", SUMS),
        ("chunk.zero_grad_buffer()", "pass", TORCH),
        ("if id(parameter) not in overwritten", "if id(parameter) in overwritten", "benchmarks/test_fake_gpu.py"),
    ],
    "pipeline/stage_messages.py": [
        ("not leads or chunk < num_chunks - 1", "True", "pipeline/test_stage_messages.py"),
        ("yield [num_rows[chunk][pack], 1,", "yield [num_rows[chunk][0], 1,", f"{SPLIT}[finetune-PP2]"),
        ("leads=self.is_pp_first_stage", "leads=self.is_pp_last_stage", f"{SPLIT}[finetune-PP2 interleaved]"),
        ("rows_out[::-1]", "rows_out", f"{FAMILY_RUNS}[blocks finetune PP2 interleaved]"),
    ],
    "pipeline/phases.py": [
        (' - phases.get("reduce", 0.0)', "", PHASES),
        ("elapsed_time(end) / 1e3", "elapsed_time(end)", PHASES),
        ("event.record()", "pass", PHASES),
        ("seconds[rank] / mean - 1", "seconds[rank] - mean", PHASES),
    ],
    "pipeline/profiling.py": [
        ("step >= self.last or is_last", "step > self.last or is_last", PHASES),
        ("step >= self.last or is_last", "step >= self.last", PHASES),
        ("not self.first <= step <= self.last", "step != self.first", PHASES),
        ('not trace.endswith(b"}")', "not trace", PHASES),
    ],
    "pipeline/loop.py": [
        ("timed(state.source.batches(state.step))", "timed(state.source.batches(0))", KILLED),
        (
            "    is_last = state.step == state.source.num_steps",
            "    is_last = False",
            f"{TRAIN}::test_stage_1_stores_what_it_trains_and_nothing_else",
        ),
        ("save_every_steps == 0 or", "save_every_steps == 1 or", f"{TRAIN}::test_a_damaged_checkpoint_is_named"),
        (
            "or is_last or state.is_stopping",
            "or is_last",
            f"{TRAIN}::test_sigterm_saves_at_the_end_of_the_step_and_the_run_goes_on",
        ),
        ("yield batch, time.monotonic() - started", "yield batch, 0.0", STEP),
        (
            "raise SystemExit(STATUS)",
            "return",
            f"{TRAIN}::test_sigterm_saves_at_the_end_of_the_step_and_the_run_goes_on",
        ),
        ("restore(state)\n", "pass\n", KILLED),
        (
            "if not state.is_any_writing:",
            "if True:",
            f"{TRAIN}::test_checkpoints_written_in_the_background_are_the_same",
        ),
    ],
    "pipeline/stop.py": [
        (
            "return self._was_asked or self.by_file()",
            "return self.by_file()",
            f"{TRAIN}::test_sigterm_saves_at_the_end_of_the_step_and_the_run_goes_on",
        ),
    ],
    "pipeline/metrics.py": [
        ("self.step_seconds / self.num_processes", "self.step_seconds", "pipeline/test_metrics.py"),
        ('["step"] <= step', '["step"] < step', "pipeline/test_metrics.py"),
        ("num_padding_tokens / num_rows", "num_padding_tokens", "pipeline/test_metrics.py"),
    ],
    "pipeline/data/order.py": [
        ("PCG64([seed, epoch])", "PCG64([seed, 0])", ORDER),
        ('side="right") - 1', 'side="left") - 1', ORDER),
        ("return -(-num_samples // global_batch_size)", "return num_samples // global_batch_size", ORDER),
        ("slice(batch * global_batch_size,", "slice(batch * global_batch_size - batch,", ORDER),
        ("turn[i : i + shards_in_use]", "turn[i : i + shards_in_use - 1]", ORDER),
        ("pieces += whole * int(source.repeat)", "pieces += whole", ORDER),
    ],
    "pipeline/data/schedule.py": [
        ("config.train.seed, epoch,", "config.train.seed, 0,", SCHEDULE),
        ('fit = values["text"] > 0', 'fit = values["text"] >= 0', SCHEDULE),
        ("ranks = deal_samples(flops,", "ranks = deal_samples([1] * len(flops),", SCHEDULE),
        ("num_skipped=len(numbers) - len(kept)", "num_skipped=0", SCHEDULE),
        ("data.max_images_per_pack)", "10**6)", SCHEDULE),
        ("training_flops=sum(flops)", "training_flops=max(flops)", SCHEDULE),
        ("part.start + num_samples)]", "num_samples)]", SCHEDULE),
    ],
    "pipeline/data/packing.py": [
        ("if text <= free_text and images", "if images", PACKING),
        ("room[i] = (free_text - text, free_images - images)", "room[i] = (free_text - text, free_images)", PACKING),
        ("heapq.heappush(load, (work + costs[i], rank))", "heapq.heappush(load, (work + 1, rank))", PACKING),
        ("return max(1, -(-num_rows // multiple))", "return -(-num_rows // multiple)", PACKING),
        ("-(-num_rows // multiple)) * multiple", "num_rows // multiple) * multiple", PACKING),
    ],
    "pipeline/data/samples.py": [
        ("np.cumsum(widths) - widths", "np.cumsum(widths) - 1", SAMPLES),
        ("~is_image & (positions < max_positions)", "~is_image & (positions <= max_positions)", SAMPLES),
        ("np.concatenate([labels[1:], [IGNORE_INDEX]])", "labels", SAMPLES),
        ("np.concatenate([text[1:], [False]])", "np.ones_like(text)", SAMPLES),
        ("is_image & (positions < positions[text][-1])", "is_image", SAMPLES),
        ("text & previous_is_image & (labels", "text & (labels", SAMPLES),
    ],
    "pipeline/data/templates.py": [
        ("return ids.index(end_id, start) + 1", "return ids.index(end_id, start)", TEMPLATES),
        ("        start = stop\n", "", TEMPLATES),
        ("if text.count(IMAGE_TOKEN) != 1:", "if True:", TEMPLATES),
        ("yield slice(answer, stop)", "yield slice(start, stop)", TEMPLATES),
    ],
    "pipeline/data/batches.py": [
        ("self.config.data.exact_images)", "False)", f"{BATCHES}::test_exact_images_are_pillows_own"),
        ("data.cache, data.cache_limit)", "data.cache)", f"{BATCHES}::test_the_cache_of_a_run_keeps_its_limit"),
        ("(self.coordinates.mp_rank - num_images_before)", "self.coordinates.mp_rank", f"{SPLIT}[finetune-TP2]"),
        (
            "[IGNORE_INDEX] * num_padding",
            "[0] * num_padding",
            f"{BATCHES}::test_padding_rows_have_no_target_and_stand_alone",
        ),
        (
            "self._ends[part] - len(self.sets[part])",
            "self._ends[part]",
            f"{BATCHES}::test_ranks_share_out_the_batch_of_one",
        ),
        ("part.repeat) for s", "1.0) for s", f"{BATCHES}::test_a_mixture_repeats_and_halves_its_sources"),
        (
            "self.num_steps = schedule.num_steps",
            "self.num_steps = schedule.num_steps - 1",
            f"{BATCHES}::test_an_epoch_has_every_sample_once_and_counts_add_up",
        ),
    ],
    "pipeline/data/lengths.py": [
        ("int(start) + n: text", "n: text", "pipeline/data/test_lengths.py"),
    ],
    "pipeline/checkpoint/checkpoint.py": [
        ("torch.set_rng_state(", "(lambda *_: None)(", CHECKPOINT),
        (
            "if other.name > checkpoint.name]",
            "if other.name >= checkpoint.name]",
            f"{TRAIN}::test_a_damaged_checkpoint_is_named",
        ),
        ('if resume == "auto":', "if False:", f"{TRAIN}::test_a_damaged_checkpoint_is_named"),
        ("is_set_to(in_place[name])", "is_contiguous()", f"{OWNED}::test_every_copy_of_the_shared_projector_is_loaded"),
    ],
    "pipeline/checkpoint/integrity.py": [
        (
            "file.is_file() and _digest(file) == digest",
            "file.is_file()",
            f"{TRAIN}::test_a_damaged_checkpoint_is_named",
        ),
        ("sorted(expected)[rank::num_ranks]", "sorted(expected)[rank + 1 :: num_ranks]", INTEGRITY),
    ],
    "pipeline/checkpoint/owned.py": [
        (
            "first, last = -(-start // row)",
            "first, last = start // row",
            f"{OWNED}::test_rectangles_are_their_range_and_in_its_order",
        ),
        (
            "begin = max(start, before)",
            "begin = start",
            f"{OWNED}::test_no_process_holds_or_writes_what_another_owns[2]",
        ),
        (
            "replica_id=(*piece.replica_id[:2], 0)",
            "replica_id=piece.replica_id",
            f"{OWNED}::test_no_process_holds_or_writes_what_another_owns[2]",
        ),
    ],
    "pipeline/checkpoint/run_info.py": [
        ("if was.get(name, value) != value", "if False", f"{TRAIN}::test_a_checkpoint_of_another_run_is_refused"),
    ],
    "pipeline/checkpoint/writer.py": [
        (
            "[: -self.keep_last]",
            "[: -self.keep_last - 1]",
            f"{CHECKPOINT}::test_a_folder_that_cannot_be_removed_does_not_end_a_run",
        ),
        ("part.rename(folder)\n", "pass\n", f"{CHECKPOINT}::test_a_checkpoint_has_all_its_tensors"),
    ],
    "pipeline/state.py": [
        ("groups.dp.rank(), groups.dp.size(),", "0, groups.dp.size(),", f"{SPLIT}[pretrain-DP2]"),
    ],
    "pipeline/start.py": [
        ("tp_group.rank(), tp_group.size())", "0, tp_group.size())", f"{SPLIT}[pretrain-TP2]"),
    ],
    "pipeline/shards/tar_reader.py": [
        (
            "if crc32(data) != slots.checksums[idx]:",
            "if False:",
            f"{DAMAGE}::test_damage_in_the_cache_is_healed_after_a_restart",
        ),
        ("start = end + -end % BLOCK_BYTES", "start = end + BLOCK_BYTES - end % BLOCK_BYTES", SHARD_SET),
    ],
    "pipeline/shards/shard_set.py": [
        (
            "shard = bisect_right(self._ends, number)",
            "shard = bisect_right(self._ends, number + 1)",
            f"{SHARD_SET}::test_samples_by_number_are_the_samples_of_the_tars",
        ),
    ],
    "pipeline/shards/shard_cache.py": [
        (
            "if excess > 0 and path not in keep:",
            "if excess > 0:",
            f"{SHARD_SET}::test_the_least_recently_used_shard_makes_way",
        ),
        (
            "make_room(self.root, limit - num_bytes, keep)",
            "make_room(self.root, limit, keep)",
            f"{SHARD_SET}::test_the_least_recently_used_shard_makes_way",
        ),
    ],
    "model/pack.py": [
        ("np.lexsort((positions_S, sample_S))", "np.lexsort((sample_S, positions_S))", FAMILY),
        ("return [t[:, None] >= torch.cat([v, t])", "return [t[:, None] > torch.cat([v, t])", SAISA),
        ("self.image_positions[:, None] + steps", "self.image_positions[:, None] + 0 * steps", SAISA),
        (
            "torch.cat([self.visual_positions_I, self.positions_T])",
            "torch.cat([self.positions_T, self.visual_positions_I])",
            SAISA,
        ),
        ("BEHIND_ALL_TEXT = 1 << 20", "BEHIND_ALL_TEXT = 0", "model/test_segments.py, model/test_attention.py"),
    ],
    "model/backend.py": [
        ("cast(Any, layer).is_first_microbatch = True", "pass", "benchmarks/test_fake_gpu.py"),
    ],
    "model/segments.py": [
        (
            "visual_end_T=images_before_T * num_tokens_per_image",
            "visual_end_T=(images_before_T + 1) * num_tokens_per_image",
            "model/test_segments.py",
        ),
        (
            "first_text = np.cumsum(counts) - counts, np.cumsum(lengths) - lengths",
            "first_text = np.cumsum(counts) - counts, np.cumsum(lengths)",
            "model/test_segments.py",
        ),
        (" | (np.diff(ranges.text_start_T) != 0)", "", "model/test_segments.py"),
        ("[visual_starts, text_starts + ranges.num_visual]", "[visual_starts, text_starts]", "model/test_segments.py"),
    ],
    "model/varlen_attention.py": [
        ("if len(segments.unseen_rows):", "if False:", "model/test_attention.py"),
        ("if len(segments.repeats):", "if False:", "model/test_attention.py"),
    ],
    "model/attention.py": [
        (
            "visual, text = x_SGH.split([sum(pack.visual_lengths)",
            "visual, text = x_SGH.flip(0).split([sum(pack.visual_lengths)",
            SAISA,
        ),
        ("torch.cat([-second, first], dim=-1)", "torch.cat([second, first], dim=-1)", SAISA),
        ("theta**-exponents", "theta**exponents", SAISA),
        (
            "key_expansion(pack) > MAX_KEY_EXPANSION",
            "key_expansion(pack) < MAX_KEY_EXPANSION",
            "model/test_attention.py",
        ),
    ],
    "model/layers.py": [
        ("table[num_visual:] for", "table[: len(q_TNH)] for", SAISA),
        ("self.input_norm(visual_ID), pack", "visual_ID, pack", SAISA),
        ("self.fc2(gelu(self.fc1(features_IC)[0]))[0]", "self.fc2(self.fc1(features_IC)[0])[0]", SAISA),
        (
            "rows_of_pack(self.resampler(features_NPC), num_padding)",
            "self.resampler(features_NPC).flatten(0, 1)",
            SAISA,
        ),
        (
            "scatter_to_tensor_model_parallel_region(features_IC, self.tp_group)",
            "features_IC.chunk(self.tp_group.size(), dim=-1)[self.tp_group.rank()].contiguous()",
            "model/test_tensor_parallel.py",
        ),
    ],
    "model/flamingo.py": [
        ("self.mlp(x_TD)[0] * sees_T1", "self.mlp(x_TD)[0]", FLAMINGO),
        ("latest_alone=self.is_open", "latest_alone=False", FLAMINGO),
        ("pack.text_alone, rotary_S1H", "pack, rotary_S1H", FLAMINGO),
    ],
    "model/cross_attention.py": [
        ("outputs.append(out * sees_any[..., None])", "outputs.append(out)", FLAMINGO),
        ("end_T - pack.num_tokens_per_image", "end_T - 1", FLAMINGO),
    ],
    "model/hf/flamingo_saisa.py": [
        ("self.mlp(x_BTD) * seen.sees_BT1", "self.mlp(x_BTD)", HF_FAMILY),
        (".masked_fill(~has_BK, NEVER)", "", HF_FAMILY),
        ("int(cache.get_seq_length()) == 0", "False", "model/test_hf_flamingo.py"),
    ],
    "model/updates.py": [
        ("self.input_norm(visual_ID), pack", "visual_ID, pack", FAMILY),
        ("out_SNH.index_select(0, slots_S)", "out_SNH.index_select(0, rows_S)", FAMILY),
        ("torch.cat([visual_ID, text_TD]) + attended", "torch.cat([visual_ID, text_TD])", FAMILY),
        ("return rows_SD + self.mlp(", "return self.mlp(", FAMILY),
        ("dim=1).flatten(0, 1)", "dim=0).flatten(0, 1)", "model/test_tensor_parallel.py"),
    ],
    "model/hf/projectors_saisa.py": [
        ("layer_norm(self.latents + self.output(", "layer_norm(self.output(", f"{SAISA}, {HF_FAMILY}"),
        ("features_NPC = layer_norm(features_NPC, width)", "pass", f"{SAISA}, {HF_FAMILY}"),
    ],
    "model/projectors.py": [
        ("attention = 2 * num_tokens", "attention = num_tokens", "model/test_flops.py"),
    ],
    "model/hf/family_saisa.py": [
        ("and layer + 1 < num_layers", "", FAMILY),
        ("and layer not in frozen_layers", "", FAMILY),
        ('"saisa": "ffn"', '"saisa": "full"', FAMILY),
    ],
    "model/hf/updates_saisa.py": [
        ("mask_B1TM=view.mask_B1SM", "mask_B1TM=view.mask_B1SM[:, :, :1]", HF_FAMILY),
        ("rows_BSD = rows_BSD + attended_BSD", "rows_BSD = attended_BSD", HF_FAMILY),
        ("slots.join(t_BTD + attended_BTD, visual)", "slots.join(attended_BTD, visual)", HF_FAMILY),
    ],
    "model/saisa.py": [
        ("self._carries(self.stage.layers.stop) else None", "False else None", FAMILY_RUN),
        ("else features_IC[:0]", "else features_IC", FAMILY_RUN),
        (" and not self.takes_features:", ":", f"{FAMILY_RUNS}[blocks pretrain TP2 PP2]"),
        ("pack.targets_T.index_select(0, pack.target_rows_R)", "pack.targets_T[: len(logits_RV)]", SAISA),
        ('return logits_TV.masked_fill(is_padding_V, float("-inf"))', "return logits_TV", SAISA),
        (".shared = not is_first", ".shared = False", f"{SPLIT}[pretrain-PP2]"),
        ("tensor_parallel_output_grad=False", "tensor_parallel_output_grad=True", f"{SPLIT}[finetune-TP2 sequence]"),
    ],
    "model/transfer.py": [
        ("pin_memory=True", "pin_memory=False", f"{WAITS}[stage 2]"),
        ("pinned.to(device, non_blocking=True)", "pinned.to(device)", f"{WAITS}[stage 2]"),
        ("[0, *ends], sizes", "[*ends], sizes", f"{WAITS}[stage 2]"),
    ],
    "model/memory.py": [
        ("ffn = text_rows + 2 * t * f", "ffn = text_rows + t * f", f"{ACTIVATIONS}[stage 2]"),
        ("copies = 2 * layers_in_8_bits", "copies = layers_in_8_bits", f"{FP8}::test_weights_are_held_in_8_bits_twice"),
        ("kept = 1 - in_8_bits", "kept = 1 - 0 * in_8_bits", f"{FP8}::test_activations_are_those_of_the_formula"),
        ("+ 2 * pack.num_gathered_keys * keys", "", f"{ACTIVATIONS}[stage 2]"),
        (
            "MAIN_WEIGHT_BYTES + 2 * MOMENT_BYTES[moments]\n    return",
            "MAIN_WEIGHT_BYTES\n    return",
            "model/test_memory.py",
        ),
    ],
    "model/config.py": [
        ("if are_divided and", "if False and", FP8),
    ],
    "model/compute.py": [
        (
            '"blockwise": "e4m3"',
            '"blockwise": "hybrid"',
            f"{FP8}::test_gradients_have_more_range_where_a_tensor_has_one_scale",
        ),
        ("tp_only_amax_red=True", "tp_only_amax_red=False", f"{FP8}::test_scales_are_agreed_on_within_a_replica"),
        ("batch_p2p_sync=False", "batch_p2p_sync=True", WAITS),
        (
            "apply_rope_fusion=has_fused_kernels(compute, compute_dtype(compute))",
            "apply_rope_fusion=False",
            f"{FAKE_GPU}, {FP8}",
        ),
        (
            "use_te_activation_func=has_fused_kernels(compute, compute_dtype(compute))",
            "use_te_activation_func=False",
            f"{FAKE_GPU}, {FP8}",
        ),
        ("calculate_per_token_loss=True", "calculate_per_token_loss=False", TORCH),
        ("layernorm_epsilon=model.norm_epsilon", "layernorm_epsilon=1e-3", SAISA),
        ("config.has_cond_embedder = shared_projector", "config.has_cond_embedder = False", f"{SPLIT}[pretrain-PP2]"),
    ],
    "model/vision.py": [
        ("return torch.cat(windows)[:num_images]", "return torch.cat(windows)", "model/test_vision.py"),
        (".transpose(0, 1).flatten(0, 1))", ".flatten(0, 1))", "model/test_vision.py"),
    ],
    "model/hf/vision_saisa.py": [
        ("pixels_N3HW.to(device, weight.dtype)", "pixels_N3HW.to(device)", f"{WAITS}[stage 2]"),
        (
            "return x_NKC[:, 1:] if self.is_clip else x_NKC",
            "return x_NKC[:, :-1] if self.is_clip else x_NKC",
            f"{STEP}, model/test_import_hf.py",
        ),
        (
            "config.num_hidden_layers + 1 + select_layer",
            "config.num_hidden_layers + select_layer",
            f"{STEP}, model/test_import_hf.py",
        ),
    ],
    "model/hf/modeling_saisa.py": [
        ("logits[..., config.image_token_id] = UNSAYABLE", "pass", "model/test_hf_modeling.py"),
        (".all(dim=-1)\n", ".any(dim=-1)\n", f"{HF_FORWARD}::test_embeddings_in_the_place_of_ids"),
        ("if num_items is None else num_items", "if True else num_items", HF_FORWARD),
        ("given is None and not runs_twice else", "given is None else", HF_FORWARD),
    ],
    "model/hf/layers_saisa.py": [
        (" * query.shape[-1] ** -0.5", "", f"{HF_FORWARD}::test_states_and_weights_equal_the_equations"),
        (', {"cache_position": view.slot_S})', ")", f"{HF_GENERATION}::test_a_static_cache_is_a_dynamic_one"),
        ("num_rows -= num_visual", "num_rows -= num_visual + 1", "model/test_hf_modeling.py"),
    ],
    "model/hf/generation_saisa.py": [
        ("if bool(is_image.any()):", "if False:", f"{HF_GENERATION}::test_prompt_lookup_never_drafts_an_image"),
        (
            "own[len(own) - number :]",
            "own[:number]",
            f"{HF_GENERATION}::test_a_conversation_goes_on_with_another_image",
        ),
        (
            "position_ids[:, -1:] + missing",
            "position_ids[:, -1:]",
            f"{HF_GENERATION}::test_positions_of_the_caller_are_counted_on",
        ),
    ],
    "model/hf_folder.py": [
        ("float(name == EMBEDDING)", "0.0", "model/test_import_hf.py::test_an_export_has_a_row_for_the_image_token"),
        (
            "config.vocab_size - config.num_image_rows",
            "config.vocab_size",
            "pipeline/test_export.py::test_an_export_is_a_base",
        ),
    ],
    "model/llava_hf_folder.py": [
        (
            "if is_needed else chat_template",
            "if False else chat_template",
            "model/test_llava.py::test_prompts_of_llava_hf_have_the_ids_of_training",
        ),
        (
            "(' ' if piece else '')",
            "' '",
            "model/test_llava.py::test_prompts_of_llava_hf_have_the_ids_of_training",
        ),
        (
            "if name == says and config.num_image_rows:",
            "if False:",
            "model/test_llava.py::test_the_image_token_that_an_export_adds_is_never_the_likeliest",
        ),
        (
            '"multi_modal_projector.linear_2."',
            '"multi_modal_projector.linear_1."',
            "model/test_llava.py::test_llava_hf_goes_out",
        ),
    ],
    "model/llava_folder.py": [
        (
            "tensor[:num_rows] if name in",
            "tensor if name in",
            "model/test_llava.py::test_llavas_own_layout_comes_in_and_goes_out",
        ),
        (
            '"LlavaImageProcessor" if is_padded else plain',
            "plain",
            "model/test_llava.py::test_llava_hf_goes_out[pad-llama-clip]",
        ),
    ],
    "pipeline/data/template_choice.py": [
        ('[("system", SYSTEM)] * has_system', "[]", "pipeline/data/test_template_choice.py"),
    ],
    "model/hf/image_processing_saisa.py": [
        ("(images.float() / scale - mean) / std", "(images.float() / scale - mean)", "model/test_image_processing.py"),
        ("(width - crop_width) // 2, (height", "(width - crop_width), (height", "model/test_image_processing.py"),
    ],
    "model/weights.py": [
        (
            'mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight',
            'mlp.up_proj.weight", f"{theirs}mlp.gate_proj.weight',
            SAISA,
        ),
        ("keys_values, model.num_query_groups)", "keys_values, 1)", SAISA),
        ("tensor.chunk(tp_size, dim)[tp_rank]", "tensor.chunk(tp_size, dim)[0]", f"{SPLIT}[pretrain-TP2]"),
        ("whole.chunk(2) if name.endswith(GATED) else (whole,)", "(whole,)", f"{SPLIT}[pretrain-TP2]"),
        ("return parts[0][: self.num_rows]", "return parts[0]", "model/test_weights.py"),
        ("return [joined[: self.num_rows]]", "return [joined]", "model/test_weights.py"),
        ("if kind.is_projected:\n", "if kind.is_projected and i:\n", "model/test_weights.py"),
        ("missing.discard(name)", "missing.clear()", "model/test_weights.py"),
    ],
    "model/parallel.py": [
        ("range(pp_rank, len(layers), pp)", "range(pp_rank, len(layers), 1)", "model/test_parallel.py"),
        ("last_cost if stage == num_stages - 1 else 0", "0", "model/test_parallel.py"),
        ("if VOCABULARY_MULTIPLE % tp == 0]", "]", "model/test_parallel.py"),
    ],
    "model/flops.py": [
        ("total = total - p.linear_q - p.attention // 2", "total = total - p.linear_q", "model/test_flops.py"),
        (
            'num_in_ffn = num_text if update == "none"',
            'num_in_ffn = num_text if update != "full"',
            "model/test_flops.py",
        ),
        (
            "attention=2 * 2 * num_asking * num_keys * queries",
            "attention=2 * num_asking * num_keys * queries",
            "model/test_flops.py",
        ),
    ],
    "model/paper_flops.py": [
        ("num_visual * sizes.h * sizes.k\n", "num_visual * sizes.h**2\n", "model/test_paper_flops.py"),
        ("2 * num_text * (num_visual + num_text)", "2 * num_text * num_text", "model/test_paper_flops.py"),
        ("+ 6 * resampler", "+ resampler", "model/test_paper_flops.py"),
    ],
    "pipeline/paper_tables.py": [
        ('return None, ""\n', "pass\n", "pipeline/test_paper_tables.py"),
        (
            "replace(sizes, k_text=sizes.h)",
            "replace(sizes, k_text=sizes.h, d=PAPER_WIDTH)",
            "pipeline/test_paper_tables.py",
        ),
    ],
    "benchmarks/latency.py": [
        ("time - encoder for", "time for", "benchmarks/test_latency.py"),
        ("on_cpu and num_prompts == 1", "num_prompts == 1", "benchmarks/test_latency.py"),
    ],
    "pipeline/evaluation/contribution.py": [
        ('config.frozen_layers = "shortv", sorted(layers)', 'config.frozen_layers = "llava", []', CONTRIBUTION),
        ('if direction == "frozen-original"', 'if direction != "frozen-original"', CONTRIBUTION),
    ],
    "pipeline/evaluation/ranking.py": [
        ("if question.images]", "]", CONTRIBUTION),
        ("key=lambda layer: means[layer]", "key=lambda layer: -means[layer]", CONTRIBUTION),
        ("/ num_samples**0.5", "/ num_samples", CONTRIBUTION),
    ],
    "data_prep/plan.py": [
        ("and total + size > shard_bytes", "and total > shard_bytes", PLAN),
        ("start, total = position, 0", "start, total = position, size", PLAN),
        ("if not settings.shuffle:", "if settings.shuffle:", PLAN),
        ("PCG64(settings.seed)", "PCG64(0)", PLAN),
        ("if entry is None:", "if False:", PLAN),
    ],
    "data_prep/records.py": [
        ("if num_tokens != len(paths):", "if num_tokens < len(paths):", "data_prep/test_records.py"),
        ('or ".." in path.split("/")', "", "data_prep/test_records.py"),
    ],
    "data_prep/tar_writer.py": [
        (
            "bytes(-len(content) % BLOCK_BYTES)",
            "bytes(BLOCK_BYTES - len(content) % BLOCK_BYTES)",
            "data_prep/test_tar_writer.py",
        ),
    ],
    "data_prep/shard_task.py": [
        ("return sidecar if derived == sidecar else None", "return sidecar", SHARD_TASK),
        ("if verified and verified != sidecar:", "if False:", SHARD_TASK),
        ("rejects.append(refuse(row.index, value, problem)._asdict())", "pass", SHARD_TASK),
    ],
    "data_prep/output.py": [
        (
            'present.keys() >= others and present.get("rejects.jsonl")',
            'present.get("rejects.jsonl")',
            "data_prep/test_output.py",
        ),
        ("            if shard.num_samples\n", "", "data_prep/test_output.py"),
    ],
    "data_prep/shard_names.py": [
        ("if tar in seen:", "if False:", "data_prep/test_shard_names.py"),
        ("if not found:", "if found is None and not isinstance(tar, str):", "data_prep/test_shard_names.py"),
    ],
    "data_prep/listings.py": [
        ("if manifest.index not in (None, file_digest(data)):", "if False:", LISTINGS),
        ("return data[-64 - END_BYTES : -END_BYTES] == _own_digest(data).encode()", "return True", LISTINGS),
    ],
    "data_prep/verify_shard.py": [
        ("elif zlib.crc32(blocks) != checksum:", "elif False:", f"{VERIFY}[zeroed_header]"),
        ("elif end != END_OF_ARCHIVE:", "elif False:", f"{VERIFY}[flipped_end]"),
        ("if sha256.hexdigest() == shard.sha256:", "if samples:", f"{VERIFY}[same_checksum]"),
    ],
    "data_prep/verify.py": [
        ("!= manifest.num_rejected:", "< 0:", f"{VERIFY}[edited_counts_of_rejects]"),
        ("if values.get(name) != value:", "if name not in values:", f"{VERIFY}[edited_count]"),
    ],
    "common/files.py": [
        ("os.replace(part, path)\n", "part.rename(path.with_suffix('.x'))\n", "common/test_files.py"),
        ("part.unlink(missing_ok=True)\n        raise", "raise", "common/test_files.py"),
        (
            "fcntl.LOCK_EX | fcntl.LOCK_NB",
            "fcntl.LOCK_SH | fcntl.LOCK_NB",
            f"{TRAIN}::test_two_runs_do_not_share_a_folder",
        ),
    ],
    "common/console.py": [
        ("2 if isinstance(error, UsageError) else 1", "1", "common/test_console.py"),
    ],
    "pipeline/config.py": [
        (
            'if "://" not in source["location"]:',
            "if True:",
            "orchestration/test_ray_train.py::test_relative_paths_mean_the_root",
        ),
    ],
    "orchestration/tiny_models.py": [
        ("torch.manual_seed(seed)\n        tower", "tower", "orchestration/test_tiny_base.py"),
    ],
    "orchestration/demo_report.py": [
        ("means.append(total / weight)", "means.append(total)", "orchestration/test_demo_report.py"),
    ],
}
