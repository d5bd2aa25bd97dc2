{{/* Our services' configuration files. What the chart sets may not be set in a pool's `config`: see files/checks/own_settings.yaml. */}}

{{/* Where services find the model: a hub id or a folder. */}}
{{- define "vitrine.model" -}}
{{- $model := required "model is required, for example --set model=Qwen/Qwen3-VL-8B-Instruct" .Values.model -}}
{{- if include "vitrine.modelClaim" . -}}
{{- printf "/models/%s" (regexReplaceAll "^pvc://[^/]+/" $model "") -}}
{{- else -}}
{{- $model -}}
{{- end -}}
{{- end -}}

{{/* Claim of a model that is pvc://CLAIM/FOLDER, else nothing. */}}
{{- define "vitrine.modelClaim" -}}
{{- if hasPrefix "pvc:" .Values.model -}}
{{- if not (regexMatch "^pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[^/].*$" .Values.model) -}}
{{- fail (printf "model %s: a folder of a claim is written pvc://CLAIM/FOLDER" .Values.model) -}}
{{- end -}}
{{- index (splitList "/" .Values.model) 2 -}}
{{- end -}}
{{- end -}}

{{/* What users call the model. */}}
{{- define "vitrine.servedName" -}}
{{- $model := include "vitrine.model" . -}}
{{- if hasPrefix "/" $model }}{{ $model = base $model }}{{ end -}}
{{- default $model .Values.servedModelName -}}
{{- end -}}

{{/* What our services read alike: (list $ workload). */}}
{{- define "vitrine.serviceConfig" -}}
{{- $root := index . 0 -}}
{{- $workload := index . 1 -}}
{{- $tls := $workload.tls -}}
host: 0.0.0.0
drain_timeout_s: {{ $workload.settings.drainTimeoutSeconds }}
log_level: {{ $root.Values.log.level }}
log_format: {{ $root.Values.log.format }}
{{- with $root.Values.otlpEndpoint }}
otlp_endpoint: {{ . | quote }}
{{- end }}
{{- if $tls.secretName }}
tls_cert_file: /etc/vitrine/tls/tls.crt
tls_key_file: /etc/vitrine/tls/tls.key
{{- if $tls.clientAuth }}
tls_client_ca_file: /etc/vitrine/tls/ca.crt
{{- end }}
{{- end }}
{{- end -}}

{{/* And those that load a model: (list $ workload). */}}
{{- define "vitrine.commonConfig" -}}
{{- $root := index . 0 -}}
model: {{ include "vitrine.model" $root | quote }}
{{- with $root.Values.revision }}
revision: {{ . | quote }}
{{- end }}
{{- with $root.Values.servedModelName }}
served_model_name: {{ . | quote }}
{{- end }}
{{ include "vitrine.serviceConfig" . }}
{{- end -}}

{{/* The encoder's: (list $ workload). Memory for same-host transports is taken only where workers can reach it. */}}
{{- define "vitrine.encoderConfig" -}}
{{- $root := index . 0 -}}
{{- $colocation := $root.Values.colocation -}}
{{- $config := fromYaml (include "vitrine.commonConfig" .) -}}
{{- $_ := set $config "port" 50051 -}}
{{- $_ := set $config "metrics_port" 9090 -}}
{{- $_ := set $config "shm_folder" (ternary "/var/run/vitrine/shm" "" (and $colocation.enabled (ne $colocation.sharedMemoryHostPath ""))) -}}
{{- if or (not $colocation.enabled) (eq $colocation.gpuSharing "none") -}}
{{- $_ := set $config "cuda_ipc_pool_bytes" 0 -}}
{{- end -}}
{{- with $root.Values.tls.encoders }}{{ if .clientAuth -}}
{{- $_ := set $config "allowed_peers" .allowedPeers -}}
{{- $_ := set $config "shared_pool_peers" .sharedPoolPeers -}}
{{- end }}{{ end -}}
{{- if eq $root.Values.engine "sglang" -}}
{{- include "vitrine.setSglang" (list $root $config) -}}
{{- end -}}
{{- mergeOverwrite $config (index . 1).settings.config | toYaml -}}
{{- end -}}

{{/* The worker's: (list $ workload). */}}
{{- define "vitrine.llmConfig" -}}
{{- $root := index . 0 -}}
{{- $workload := index . 1 -}}
{{- $values := $root.Values -}}
{{- $config := fromYaml (include "vitrine.commonConfig" .) -}}
{{- $_ := set $config "port" 8000 -}}
{{- $_ := set $config "grpc_port" 50052 -}}
{{- $_ := set $config "role" $workload.settings.role -}}
{{- include "vitrine.setAccess" (list $root $workload $config) -}}
{{- if eq $workload.settings.role "decode" -}}
{{- include "vitrine.setPrefillWorkers" (list $root $workload $config) -}}
{{- else -}}
{{- include "vitrine.setEncoders" (list $root $workload $config) -}}
{{- end -}}
{{- $colocation := $values.colocation -}}
{{- if and $colocation.enabled $colocation.sharedMemoryHostPath -}}
{{- $_ := set $config "shm_folder" "/var/run/vitrine/shm" -}}
{{- else if eq $workload.settings.role "prefill" -}}
{{- $_ := set $config "shm_folder" "" -}}
{{- end -}}
{{- if and (eq $workload.settings.role "prefill") (or (not $colocation.enabled) (eq $colocation.gpuSharing "none")) -}}
{{- $_ := set $config "cuda_ipc_pool_bytes" 0 -}}
{{- end -}}
{{- mergeOverwrite $config $workload.settings.config | toYaml -}}
{{- end -}}

{{/* Sets which keys users need, and the port of the metrics: (list $ workload config). */}}
{{- define "vitrine.setAccess" -}}
{{- $config := index . 2 -}}
{{- if eq (include "vitrine.takesKeys" .) "true" -}}
{{- $_ := set $config "api_keys_file" "/etc/vitrine/keys/keys.yaml" -}}
{{- end -}}
{{- if eq (include "vitrine.hasMetricsPort" .) "true" -}}
{{- $_ := set $config "metrics_port" 9090 -}}
{{- end -}}
{{- end -}}

{{/* The gateway's: (list $ workload). */}}
{{- define "vitrine.gatewayConfig" -}}
{{- $root := index . 0 -}}
{{- $config := fromYaml (include "vitrine.serviceConfig" .) -}}
{{- $_ := set $config "port" 8000 -}}
{{- $_ := set $config "grpc_port" 50053 -}}
{{- $_ := set $config "tenant" $root.Values.vllm.tenant -}}
{{- include "vitrine.setAccess" (list $root (index . 1) $config) -}}
{{- $_ := set $config "servers" (include "vitrine.address" (list $root "llm-headless" "http" 8000)) -}}
{{- include "vitrine.setEncoders" (list $root (index . 1) $config) -}}
{{- mergeOverwrite $config (index . 1).settings.config | toYaml -}}
{{- end -}}

{{/* Sets what a worker, our connector in vLLM or the gateway needs to use encoders: (list $ workload config). */}}
{{- define "vitrine.setEncoders" -}}
{{- $root := index . 0 -}}
{{- $config := index . 2 -}}
{{- $tls := $root.Values.tls.encoders -}}
{{- $pools := include "vitrine.encoderPools" (list $root (index . 1)) -}}
{{- $_ := set $config "encoders" (include "vitrine.addresses" (list $root "encoder" 50051 $pools)) -}}
{{- include "vitrine.setTlsTowards" (list $config $tls "/etc/vitrine/encoder-tls" $tls.serverName) -}}
{{- end -}}

{{/* Sets what a worker needs to use prefill workers, whose certificate is its own: (list $ workload config). */}}
{{- define "vitrine.setPrefillWorkers" -}}
{{- $root := index . 0 -}}
{{- $config := index . 2 -}}
{{- $pools := include "vitrine.prefillPools" (list $root (index . 1)) -}}
{{- $_ := set $config "prefill_workers" (include "vitrine.addresses" (list $root "llm" 50052 $pools)) -}}
{{- $serverName := printf "%s.%s.svc" (include "vitrine.name" (list $root "llm")) $root.Release.Namespace -}}
{{- include "vitrine.setTlsTowards" (list $config $root.Values.tls.llm "/etc/vitrine/tls" $serverName) -}}
{{- end -}}

{{/* Where a worker finds the pods of these pools, separated by spaces: (list $ component port pools). */}}
{{- define "vitrine.addresses" -}}
{{- $root := index . 0 -}}
{{- $component := index . 1 -}}
{{- $port := index . 2 -}}
{{- $addresses := list -}}
{{- range index . 3 | splitList " " -}}
{{- $addresses = append $addresses (include "vitrine.address" (list $root (printf "%s-%s" $component .) "grpc" $port)) -}}
{{- end -}}
{{- join "," $addresses -}}
{{- end -}}

{{/* Where to find the pods of a headless Service: (list $ suffixOfItsName portName port). */}}
{{- define "vitrine.address" -}}
{{- $root := index . 0 -}}
{{- $service := include "vitrine.name" (list $root (index . 1)) -}}
{{- if eq $root.Values.discovery "kubernetes" -}}
{{- printf "kubernetes:%s/%s:%s" $root.Release.Namespace $service (index . 2) -}}
{{- else -}}
{{- include "vitrine.dnsAddress" (list $root (index . 1) (index . 3)) -}}
{{- end -}}
{{- end -}}

{{/* The same by DNS: (list $ suffixOfItsName port). */}}
{{- define "vitrine.dnsAddress" -}}
{{- $root := index . 0 -}}
{{- printf "dns:%s.%s.svc:%d" (include "vitrine.name" (list $root (index . 1))) $root.Release.Namespace (index . 2) -}}
{{- end -}}

{{/* Sets how a worker trusts who it asks, and shows itself: (list config tls folder serverName). */}}
{{- define "vitrine.setTlsTowards" -}}
{{- $config := index . 0 -}}
{{- $tls := index . 1 -}}
{{- $folder := index . 2 -}}
{{- if $tls.secretName -}}
{{- $_ := set $config "encoder_ca_file" (printf "%s/ca.crt" $folder) -}}
{{- $_ := set $config "encoder_server_name" (index . 3) -}}
{{- if $tls.clientAuth -}}
{{- $_ := set $config "encoder_cert_file" (printf "%s/tls.crt" $folder) -}}
{{- $_ := set $config "encoder_key_file" (printf "%s/tls.key" $folder) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* A pool's: (list $ workload). */}}
{{- define "vitrine.config" -}}
{{- include (printf "vitrine.%sConfig" (index . 1).program) . -}}
{{- end -}}
