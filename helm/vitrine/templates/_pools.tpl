{{/*
Every pool of all components: {pools: [{component, pool, name, program, tls, usesEncoders, gpuSharing, settings}]}. Nothing in mode
rayservice. program: what its pods run, after which templates are named; tls: what users' ports serve with; usesEncoders: whether its
pods connect to encoders by gRPC; settings: the component's defaults with the pool's own merged in.
*/}}
{{- define "vitrine.pools" -}}
{{- $root := . -}}
{{- include "vitrine.checkEngine" . -}}
{{- $pools := list -}}
{{- if eq .Values.mode "deployments" -}}
{{- $components := dict "encoder" .Values.encoders "llm" .Values.llm -}}
{{- range $component := list "encoder" "llm" -}}
{{- $values := index $components $component -}}
{{- if not $values.pools -}}
{{- fail (printf "there is no %s pool: fill %s.pools" $component (ternary "encoders" "llm" (eq $component "encoder"))) -}}
{{- end -}}
{{- range $pool, $own := $values.pools -}}
{{- $settings := mergeOverwrite (deepCopy $values.defaults) (deepCopy ($own | default dict)) -}}
{{- if not $settings.startupTimeoutSeconds -}}
{{- $_ := set $settings "startupTimeoutSeconds" (ternary 600 1800 (eq $root.Values.engine "vitrine")) -}}
{{- end -}}
{{- $name := include "vitrine.name" (list $root (printf "%s-%s" $component $pool)) -}}
{{- $workload := dict "component" $component "pool" $pool "name" $name "gpuSharing" $root.Values.colocation.gpuSharing "settings" $settings -}}
{{- include "vitrine.checkPool" (list $root $workload) -}}
{{- $pools = append $pools (merge $workload (include (printf "vitrine.%sFacts" $component) (list $root $settings) | fromYaml)) -}}
{{- end -}}
{{- end -}}
{{- if eq (include "vitrine.hasGateway" .) "true" -}}
{{- $none := dict "autoscaling" (dict "kind" "none") "gpu" (dict "count" 0) "runtimeClassName" "" "encoderPools" list -}}
{{- $workload := dict "component" "gateway" "pool" "default" "name" (include "vitrine.name" (list $root "gateway")) "gpuSharing" "none" -}}
{{- $_ := set $workload "settings" (merge $none .Values.gateway) -}}
{{- $pools = append $pools (merge $workload (dict "program" "gateway" "tls" .Values.tls.llm "usesEncoders" true)) -}}
{{- end -}}
{{- end -}}
{{- dict "pools" $pools | toYaml -}}
{{- end -}}

{{/* Program, TLS and whether encoders are used, of an encoder pool: (list $ settings). */}}
{{- define "vitrine.encoderFacts" -}}
{{- dict "program" "encoder" "tls" (index . 0).Values.tls.encoders "usesEncoders" false | toYaml -}}
{{- end -}}

{{/* The same of a pool of workers or of another engine's servers, with which a gateway speaks without TLS: (list $ settings). */}}
{{- define "vitrine.llmFacts" -}}
{{- $values := (index . 0).Values -}}
{{- $noTls := dict "secretName" "" "clientAuth" false -}}
{{- $facts := dict "program" (include "vitrine.llmProgram" (index . 0)) -}}
{{- $_ := set $facts "tls" (ternary $noTls $values.tls.llm (eq (include "vitrine.hasGateway" (index . 0)) "true")) -}}
{{- $_ := set $facts "usesEncoders" (and (ne (index . 1).role "decode") (ne $values.engine "sglang")) -}}
{{- toYaml $facts -}}
{{- end -}}

{{- define "vitrine.llmProgram" -}}
{{- ternary "llm" .Values.engine (eq .Values.engine "vitrine") -}}
{{- end -}}

{{/* Whether a gateway stands in front of the engine's servers: "true" or "false". */}}
{{- define "vitrine.hasGateway" -}}
{{- and (eq .Values.mode "deployments") (eq .Values.engine "vllm") (eq .Values.vllm.mode "M") -}}
{{- end -}}

{{/* Fails where `engine` and other values do not go together. */}}
{{- define "vitrine.checkEngine" -}}
{{- if and .Values.accessKeys.secretName (ne .Values.engine "vitrine") (ne (include "vitrine.hasGateway" .) "true") -}}
{{- fail (printf "accessKeys are for our workers and the gateway: with engine %s users call servers that have keys of their own" .Values.engine) -}}
{{- end -}}
{{- if and (ne .Values.engine "vitrine") (eq .Values.mode "rayservice") -}}
{{- fail (printf "mode rayservice serves with our workers alone: engine %s needs mode deployments" .Values.engine) -}}
{{- end -}}
{{- if eq .Values.engine "sglang" -}}
{{- if .Values.colocation.enabled -}}
{{- fail "engine sglang gets embeddings over the network alone: leave colocation off" -}}
{{- end -}}
{{- if .Values.tls.encoders.secretName -}}
{{- fail "SGLang calls encoders by their pods' addresses, which no certificate lists: leave tls.encoders empty" -}}
{{- end -}}
{{- if .Values.tls.llm.clientAuth -}}
{{- fail "SGLang does not demand certificates of clients: leave tls.llm.clientAuth off, and put what demands them in front" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Fails where a pool's settings do not go together with mode and `engine`: (list $ workload). */}}
{{- define "vitrine.checkPool" -}}
{{- $engine := (index . 0).Values.engine -}}
{{- $workload := index . 1 -}}
{{- $settings := $workload.settings -}}
{{- if eq $settings.autoscaling.kind "ray" -}}
{{- fail (printf "autoscaling.kind ray of %s pool %q is for mode rayservice: use none, hpa or keda" $workload.component $workload.pool) -}}
{{- end -}}
{{- if and (eq $workload.component "llm") (ne $engine "vitrine") -}}
{{- if ne $settings.role "both" -}}
{{- fail (printf "llm.pools.%s has role %s, which engine %s does not have: leave it out" $workload.pool $settings.role $engine) -}}
{{- end -}}
{{- if and $settings.encoderPools (or (eq $engine "sglang") (eq (include "vitrine.hasGateway" (index . 0)) "true")) -}}
{{- fail (printf "llm.pools.%s.encoderPools: with a gateway, and with engine sglang, all servers use all encoders: leave it out" $workload.pool) -}}
{{- end -}}
{{- if and (eq $engine "sglang") (ne $settings.autoscaling.kind "none") -}}
{{- fail (printf "llm.pools.%s has autoscaling, but encoders register with a fixed number of SGLang's pods: set replicas" $workload.pool) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Names of the encoder pools that a pool of workers or the gateway uses, separated by spaces: (list $ workload). */}}
{{- define "vitrine.encoderPools" -}}
{{- $root := index . 0 -}}
{{- $workload := index . 1 -}}
{{- $wanted := $workload.settings.encoderPools | default (keys $root.Values.encoders.pools | sortAlpha) -}}
{{- range $wanted -}}
{{- if not (hasKey $root.Values.encoders.pools .) -}}
{{- fail (printf "llm.pools.%s.encoderPools names %q, but encoders.pools has only %s" $workload.pool . (keys $root.Values.encoders.pools | sortAlpha | join ", ")) -}}
{{- end -}}
{{- end -}}
{{- join " " $wanted -}}
{{- end -}}

{{/* Names of the prefill pools that a pool of role decode uses, separated by spaces: (list $ workload). */}}
{{- define "vitrine.prefillPools" -}}
{{- $root := index . 0 -}}
{{- $workload := index . 1 -}}
{{- $found := list -}}
{{- range (include "vitrine.pools" $root | fromYaml).pools -}}
{{- if and (eq .component "llm") (eq .settings.role "prefill") }}{{ $found = append $found .pool }}{{ end -}}
{{- end -}}
{{- if not $found -}}
{{- fail (printf "llm.pools.%s has role decode, but there is no pool of role prefill" $workload.pool) -}}
{{- end -}}
{{- $wanted := $workload.settings.prefillPools | default $found -}}
{{- range $wanted -}}
{{- if not (has . $found) -}}
{{- fail (printf "llm.pools.%s.prefillPools names %q, but pools of role prefill are only %s" $workload.pool . (join ", " $found)) -}}
{{- end -}}
{{- end -}}
{{- join " " $wanted -}}
{{- end -}}

{{/* Whether some pool takes its prompts from others: "true" or nothing. */}}
{{- define "vitrine.hasDecodePools" -}}
{{- $found := "" -}}
{{- range (include "vitrine.pools" . | fromYaml).pools -}}
{{- if and (eq .component "llm") (eq .settings.role "decode") }}{{ $found = "true" }}{{ end -}}
{{- end -}}
{{- $found -}}
{{- end -}}

{{/* Selects the pods that users talk to: those of prefill pools only where there is no decode pool. */}}
{{- define "vitrine.userLabels" -}}
{{ include "vitrine.selectorLabels" (list . "llm") }}
{{- if eq (include "vitrine.hasDecodePools" .) "true" }}
vitrine/users: "true"
{{- end -}}
{{- end -}}

{{/* Labels that select a pool's pods: (list $ workload). */}}
{{- define "vitrine.poolSelectorLabels" -}}
{{- $workload := index . 1 -}}
{{ include "vitrine.selectorLabels" (list (index . 0) $workload.component) }}
vitrine/pool: {{ $workload.pool }}
{{- end -}}

{{/* Labels of a pool's objects: (list $ workload). */}}
{{- define "vitrine.poolLabels" -}}
{{- $workload := index . 1 -}}
{{ include "vitrine.labels" (list (index . 0) $workload.component) }}
vitrine/pool: {{ $workload.pool }}
{{- end -}}
