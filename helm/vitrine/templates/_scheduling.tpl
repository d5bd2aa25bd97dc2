{{/*
Affinity of a pool's pods: (list $ workload). To the pool's own value come, with colocation, worker to encoder, or to the worker that prefills, and where
pods see every GPU of a node, one pod of a pool on a node: two would take the same GPU.
*/}}
{{- define "vitrine.affinity" -}}
{{- $root := index . 0 -}}
{{- $workload := index . 1 -}}
{{- $colocation := $root.Values.colocation -}}
{{- $affinity := deepCopy $workload.settings.affinity -}}
{{- if and $colocation.enabled (eq $workload.component "llm") -}}
{{- $decodes := eq $workload.settings.role "decode" -}}
{{- $names := include (ternary "vitrine.prefillPools" "vitrine.encoderPools" $decodes) . | splitList " " -}}
{{- $pools := dict "key" "vitrine/pool" "operator" "In" "values" $names -}}
{{- $labels := include "vitrine.selectorLabels" (list $root (ternary "llm" "encoder" $decodes)) | fromYaml -}}
{{- $term := dict "topologyKey" "kubernetes.io/hostname" "labelSelector" (dict "matchLabels" $labels "matchExpressions" (list $pools)) -}}
{{- $podAffinity := $affinity.podAffinity | default dict -}}
{{- if eq $colocation.affinity "required" -}}
{{- $key := "requiredDuringSchedulingIgnoredDuringExecution" -}}
{{- $_ := set $podAffinity $key (append (index $podAffinity $key | default list) $term) -}}
{{- else -}}
{{- $key := "preferredDuringSchedulingIgnoredDuringExecution" -}}
{{- $_ := set $podAffinity $key (append (index $podAffinity $key | default list) (dict "weight" 100 "podAffinityTerm" $term)) -}}
{{- end -}}
{{- $_ := set $affinity "podAffinity" $podAffinity -}}
{{- end -}}
{{- if eq $workload.gpuSharing "runtimeClass" -}}
{{- $labels := include "vitrine.poolSelectorLabels" . | fromYaml -}}
{{- $term := dict "topologyKey" "kubernetes.io/hostname" "labelSelector" (dict "matchLabels" $labels) -}}
{{- $podAntiAffinity := $affinity.podAntiAffinity | default dict -}}
{{- $key := "requiredDuringSchedulingIgnoredDuringExecution" -}}
{{- $_ := set $podAntiAffinity $key (append (index $podAntiAffinity $key | default list) $term) -}}
{{- $_ := set $affinity "podAntiAffinity" $podAntiAffinity -}}
{{- end -}}
{{- with $affinity }}{{ toYaml . }}{{ end -}}
{{- end -}}

{{/* A pool's spread: (list $ workload). */}}
{{- define "vitrine.topologySpreadConstraints" -}}
{{- $labels := include "vitrine.poolSelectorLabels" . | fromYaml -}}
{{- range (index . 1).settings.topologySpreadConstraints }}
- {{ merge (deepCopy .) (dict "labelSelector" (dict "matchLabels" $labels)) | toYaml | nindent 2 | trim }}
{{- end -}}
{{- end -}}

{{/* Where a container's GPUs come from: (list $ workload). Limits and requests, with the GPU or the claim. */}}
{{- define "vitrine.resources" -}}
{{- $settings := (index . 1).settings -}}
{{- $resources := deepCopy $settings.resources -}}
{{- if eq (index . 1).gpuSharing "resourceClaim" -}}
{{- $_ := set $resources "claims" (list (dict "name" "gpus")) -}}
{{- else if $settings.gpu.count -}}
{{- $_ := set $resources "limits" (set ($resources.limits | default dict) $settings.gpu.resource $settings.gpu.count) -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Name of the ResourceClaim that encoders and workers share. */}}
{{- define "vitrine.resourceClaimName" -}}
{{- default (include "vitrine.name" (list . "gpus")) .Values.colocation.resourceClaim.name -}}
{{- end -}}
