{{/* The services' configuration files. What the chart sets may not be set in a pool's `config`: see values.schema.json. */}}

{{/* What both services read alike: (list $ workload). */}}
{{- define "vitrine.commonConfig" -}}
{{- $root := index . 0 -}}
{{- $workload := index . 1 -}}
{{- $tls := $workload.component | eq "encoder" | ternary $root.Values.tls.encoders $root.Values.tls.llm -}}
model: {{ required "model is required, for example --set model=Qwen/Qwen3-VL-8B-Instruct" $root.Values.model | quote }}
{{- with $root.Values.revision }}
revision: {{ . | quote }}
{{- end }}
{{- with $root.Values.servedModelName }}
served_model_name: {{ . | quote }}
{{- end }}
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

{{/* Sets what a worker needs to use encoders: (list $ workload config). */}}
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
{{- $service := include "vitrine.name" (list $root (printf "%s-%s" $component .)) -}}
{{- if eq $root.Values.discovery "kubernetes" -}}
{{- $addresses = append $addresses (printf "kubernetes:%s/%s:grpc" $root.Release.Namespace $service) -}}
{{- else -}}
{{- $addresses = append $addresses (printf "dns:%s.%s.svc:%d" $service $root.Release.Namespace $port) -}}
{{- end -}}
{{- end -}}
{{- join "," $addresses -}}
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
{{- include (printf "vitrine.%sConfig" (index . 1).component) . -}}
{{- end -}}
