{{/*
What differs between the programs that pods run: `encoder`, `llm` and `gateway`, which are ours, `vllm` with our connector, and `sglang`.
All take (list $ workload). Their configuration files are in _config.tpl, their probes in _probes.tpl.
*/}}

{{- define "vitrine.programImage" -}}
{{- $root := index . 0 -}}
{{- $workload := index . 1 -}}
{{- $tag := default $root.Chart.AppVersion $root.Values.images.tag -}}
{{- if eq $workload.program "sglang" }}{{ $tag = printf "v%s" $root.Values.sglang.version }}{{ end -}}
{{- include "vitrine.image" (list $root (default (index $root.Values.images $workload.program) $workload.settings.image) $tag) -}}
{{- end -}}

{{/* Image of the pods that Helm's hooks run: one of ours that each mode has. */}}
{{- define "vitrine.hookImage" -}}
{{- $image := ternary .Values.images.ray .Values.images.encoder (eq .Values.mode "rayservice") -}}
{{- include "vitrine.image" (list . $image (default .Chart.AppVersion .Values.images.tag)) -}}
{{- end -}}

{{/* What these pods have in common, but for containers and volumes. */}}
{{- define "vitrine.hookPodFields" -}}
restartPolicy: Never
automountServiceAccountToken: false
enableServiceLinks: false
securityContext:
  {{- toYaml .Values.podSecurityContext | nindent 2 }}
{{- with .Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* Command and arguments. Our images start their program; a variable then names the configuration file, but to vLLM. */}}
{{- define "vitrine.command" -}}
{{- $workload := index . 1 -}}
{{- $arguments := $workload.settings.extraArgs -}}
{{- if has $workload.program (list "vllm" "sglang") -}}
{{- $arguments = concat (list "--config" "/etc/vitrine/config/config.yaml") $arguments -}}
{{- end -}}
{{- if eq $workload.program "sglang" }}
command: [python3, -m, sglang.launch_server]
{{- end }}
{{- with $arguments }}
args:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "vitrine.programEnv" -}}
{{- $root := index . 0 -}}
{{- $program := (index . 1).program -}}
{{- if has $program (list "encoder" "llm" "gateway") -}}
- name: VITRINE_{{ upper $program }}_CONFIG
  value: /etc/vitrine/config/config.yaml
{{- if and (eq $program "encoder") (eq $root.Values.engine "sglang") }}
- name: VITRINE_ENCODER_SGLANG_ADVERTISE_HOST
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
{{- end }}
{{- else if eq $program "vllm" -}}
- name: VLLM_LOGGING_LEVEL
  value: {{ upper $root.Values.log.level }}
{{- else -}}
# The image has no user of this id: what names its caches after the user takes the name from here.
- name: USER
  value: vitrine
{{- end }}
{{- if ne $program "gateway" }}
{{ include "vitrine.commonEnv" $root }}
{{- end }}
{{- end -}}

{{/* Whether users call the program, and need keys: "true" or "false". Prefill workers are called by decode workers. */}}
{{- define "vitrine.takesKeys" -}}
{{- $workload := index . 1 -}}
{{- $isCalled := or (eq $workload.program "gateway") (and (eq $workload.program "llm") (ne $workload.settings.role "prefill")) -}}
{{- and (ne (index . 0).Values.accessKeys.secretName "") $isCalled -}}
{{- end -}}

{{/* Whether the program's metrics are on a port of their own: "true" or "false". */}}
{{- define "vitrine.hasMetricsPort" -}}
{{- $program := (index . 1).program -}}
{{- or (eq $program "encoder") (and (ne (index . 0).Values.accessKeys.secretName "") (has $program (list "llm" "gateway"))) -}}
{{- end -}}

{{/* A list of name and port. */}}
{{- define "vitrine.ports" -}}
{{- $program := (index . 1).program -}}
{{- if eq $program "encoder" -}}
- {name: grpc, port: 50051}
{{- if eq (index . 0).Values.engine "sglang" }}
- {name: sglang, port: 30000}
{{- end }}
{{- else -}}
- {name: http, port: 8000}
{{- if eq $program "llm" }}
- {name: grpc, port: 50052}
{{- else if eq $program "gateway" }}
- {name: grpc, port: 50053}
{{- else if eq $program "sglang" }}
- {name: registration, port: 8997}
{{- end }}
{{- end }}
{{- if eq (include "vitrine.hasMetricsPort" .) "true" }}
- {name: metrics, port: 9090}
{{- end }}
{{- end -}}

{{/*
Size of the volume at /dev/shm, or nothing: vLLM, SGLang and workers on several GPUs pass data between their processes there, and
Kubernetes gives 64 MiB.
*/}}
{{- define "vitrine.sharedMemorySize" -}}
{{- $program := (index . 1).program -}}
{{- $settings := (index . 1).settings -}}
{{- if has $program (list "vllm" "sglang") -}}
{{- default (index (index . 0).Values $program).sharedMemorySize $settings.sharedMemorySize -}}
{{- else if eq $program "llm" -}}
{{- default (ternary "4Gi" "" (gt (int (default 1 $settings.config.tp)) 1)) $settings.sharedMemorySize -}}
{{- end -}}
{{- end -}}

{{/* Folders to write to. The gateway keeps nothing. */}}
{{- define "vitrine.volumeMounts" -}}
{{- $program := (index . 1).program -}}
{{- if eq $program "gateway" -}}
- {name: tmp, mountPath: /tmp}
{{- else -}}
{{ include "vitrine.commonVolumeMounts" (index . 0) }}
{{- end }}
{{- if include "vitrine.sharedMemorySize" . }}
- {name: dev-shm, mountPath: /dev/shm}
{{- end }}
{{- end -}}

{{- define "vitrine.volumes" -}}
{{- $root := index . 0 -}}
{{- $program := (index . 1).program -}}
{{- if eq $program "gateway" -}}
- name: tmp
  emptyDir: {}
{{- else -}}
{{ include "vitrine.commonVolumes" $root }}
{{- end }}
{{- with include "vitrine.sharedMemorySize" . }}
- name: dev-shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ . }}
{{- end }}
{{- end -}}

{{/*
What the program's pods are scaled by, and how much of it a pod should have: {metrics: [{metric, target}]}, of which the largest
number of pods counts. `autoscaling.target` is the first one's.
*/}}
{{- define "vitrine.scaling" -}}
{{- $workload := index . 1 -}}
{{- $metrics := dict
  "encoder" (dict "metric" "vitrine_encoder_queue_seconds" "target" "1")
  "llm" (dict "metric" "vitrine_llm_queued_prefill_tokens" "target" "16384")
  "decode" (dict "metric" "vitrine_llm_load" "target" "0.7")
  "vllm" (dict "metric" "vllm:num_requests_waiting" "target" "4") -}}
{{- /* Prompts that decode workers have not computed are those that prefill workers have not. */ -}}
{{- $isDecode := and (eq $workload.program "llm") (eq ($workload.settings.role | default "") "decode") -}}
{{- $scaling := index $metrics (ternary "decode" $workload.program $isDecode) -}}
metrics:
- metric: {{ $scaling.metric }}
  target: {{ default $scaling.target $workload.settings.autoscaling.target | quote }}
{{- if and (eq $workload.program "llm") (eq ($workload.settings.role | default "both") "both") }}
{{- /* Long answers fill a worker without a prompt that waits. */}}
- metric: vitrine_llm_load
  target: "0.7"
{{- end }}
{{- if eq $workload.program "encoder" }}
{{- /* A queue is short however many pods are idle: without their load too many would end, and then be missing. */}}
- metric: vitrine_encoder_load
  target: "0.7"
{{- end }}
{{- end -}}
