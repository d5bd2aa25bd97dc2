{{/*
Every pool of both components: {pools: [{component, pool, name, settings}]}, settings being the component's defaults with
the pool's own merged in. Nothing in mode rayservice.
*/}}
{{- define "vitrine.pools" -}}
{{- $root := . -}}
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
{{- if eq $settings.autoscaling.kind "ray" -}}
{{- fail (printf "autoscaling.kind ray of %s pool %q is for mode rayservice: use none, hpa or keda" $component $pool) -}}
{{- end -}}
{{- $name := include "vitrine.name" (list $root (printf "%s-%s" $component $pool)) -}}
{{- $pools = append $pools (dict "component" $component "pool" $pool "name" $name "settings" $settings) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- dict "pools" $pools | toYaml -}}
{{- end -}}

{{/* Names of the encoder pools that a worker pool uses, separated by spaces: (list $ workload). */}}
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
