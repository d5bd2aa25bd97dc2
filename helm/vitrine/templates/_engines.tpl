{{/* Configuration files of vLLM and SGLang, and what encoders need to know of SGLang. They take their flags with underscores. */}}

{{/* vLLM's: (list $ workload). */}}
{{- define "vitrine.vllmConfig" -}}
{{- $root := index . 0 -}}
{{- $workload := index . 1 -}}
{{- $values := $root.Values -}}
{{- $config := dict "model" (include "vitrine.model" $root) "host" "0.0.0.0" "port" 8000 -}}
{{- $_ := set $config "shutdown_timeout" $workload.settings.drainTimeoutSeconds -}}
{{- include "vitrine.setServer" (list $root $workload $config) -}}
{{- with $values.otlpEndpoint }}{{ $_ := set $config "otlp_traces_endpoint" . }}{{ end -}}
{{- if $workload.tls.clientAuth -}}
{{- $_ := set $config "ssl_ca_certs" "/etc/vitrine/tls/ca.crt" -}}
{{- /* Python's ssl.CERT_REQUIRED. */ -}}
{{- $_ := set $config "ssl_cert_reqs" 2 -}}
{{- end -}}
{{- if eq $values.vllm.mode "M" -}}
{{- /* No tower is loaded: pictures and videos come as metadata. */ -}}
{{- $_ := set $config "limit_mm_per_prompt" (dict "image" 0 "video" 0) -}}
{{- end -}}
{{- $_ := set $config "ec_transfer_config" (include "vitrine.ecTransferConfig" . | fromYaml) -}}
{{- mergeOverwrite $config $workload.settings.config | toYaml -}}
{{- end -}}

{{/* What vLLM loads our connector by: (list $ workload). */}}
{{- define "vitrine.ecTransferConfig" -}}
{{- $root := index . 0 -}}
{{- $connector := dict "tenant" $root.Values.vllm.tenant -}}
{{- include "vitrine.setEncoders" (list $root (index . 1) $connector) -}}
{{- if and $root.Values.colocation.enabled $root.Values.colocation.sharedMemoryHostPath -}}
{{- $_ := set $connector "shm_folder" "/var/run/vitrine/shm" -}}
{{- end -}}
ec_connector: VitrineConnector
ec_connector_module_path: vitrine_vlm.vllm_connector.connector
ec_role: ec_consumer
ec_connector_extra_config:
  {{- mergeOverwrite $connector $root.Values.vllm.connector | toYaml | nindent 2 }}
{{- end -}}

{{/* SGLang's: (list $ workload). Encoders register with it. */}}
{{- define "vitrine.sglangConfig" -}}
{{- $root := index . 0 -}}
{{- $workload := index . 1 -}}
{{- $config := dict "model_path" (include "vitrine.model" $root) "host" "0.0.0.0" "port" 8000 -}}
{{- $_ := set $config "language_only" true -}}
{{- $_ := set $config "encoder_bootstrap_port" 8997 -}}
{{- $_ := set $config "encoder_transfer_backend" "zmq_to_scheduler" -}}
{{- $_ := set $config "enable_metrics" true -}}
{{- $_ := set $config "log_level" $root.Values.log.level -}}
{{- include "vitrine.setServer" (list $root $workload $config) -}}
{{- mergeOverwrite $config $workload.settings.config | toYaml -}}
{{- end -}}

{{/* Sets what vLLM and SGLang call alike: (list $ workload config). */}}
{{- define "vitrine.setServer" -}}
{{- $values := (index . 0).Values -}}
{{- $config := index . 2 -}}
{{- with $values.revision }}{{ $_ := set $config "revision" . }}{{ end -}}
{{- $_ := set $config "served_model_name" (include "vitrine.servedName" (index . 0)) -}}
{{- if (index . 1).tls.secretName -}}
{{- $_ := set $config "ssl_certfile" "/etc/vitrine/tls/tls.crt" -}}
{{- $_ := set $config "ssl_keyfile" "/etc/vitrine/tls/tls.key" -}}
{{- end -}}
{{- end -}}

{{/* Sets how an encoder speaks to SGLang: (list $ config). */}}
{{- define "vitrine.setSglang" -}}
{{- $root := index . 0 -}}
{{- $config := index . 1 -}}
{{- $sglang := $root.Values.sglang -}}
{{- if not $sglang.receivers -}}
{{- fail "engine sglang: sglang.receivers must name the networks of SGLang's pods, to which alone encoders send embeddings, for example --set sglang.receivers={10.244.0.0/16}" -}}
{{- end -}}
{{- $_ := set $config "sglang_port" 30000 -}}
{{- $_ := set $config "sglang_version" $sglang.version -}}
{{- $_ := set $config "sglang_receivers" (join "," $sglang.receivers) -}}
{{- $_ := set $config "sglang_register" (include "vitrine.sglangServers" $root) -}}
{{- /* By DNS: encoders open what strangers send and get no token of the API server. */ -}}
{{- $pools := keys $root.Values.encoders.pools | sortAlpha -}}
{{- $addresses := list -}}
{{- range $pools }}{{ $addresses = append $addresses (include "vitrine.dnsAddress" (list $root (printf "encoder-%s" .) 50051)) }}{{ end -}}
{{- $_ := set $config "sglang_peers" (join "," $addresses) -}}
{{- end -}}

{{/* Where encoders register with every pod of SGLang's pools: a StatefulSet gives each a name. */}}
{{- define "vitrine.sglangServers" -}}
{{- $root := . -}}
{{- $domain := printf "%s.%s.svc" (include "vitrine.name" (list . "llm-headless")) .Release.Namespace -}}
{{- $servers := list -}}
{{- range (include "vitrine.pools" . | fromYaml).pools -}}
{{- if eq .program "sglang" -}}
{{- $name := .name -}}
{{- range until (int .settings.replicas) }}{{ $servers = append $servers (printf "http://%s-%d.%s:8997" $name . $domain) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- join "," $servers -}}
{{- end -}}
