{{/* Fail, in words, where values contradict each other or would be taken and do nothing. Types and patterns are in values.schema.json. */}}

{{/* Older ones evaluate all of what stands behind `and` and `or`, also where the first settles it. */}}
{{- define "vitrine.checkHelm" -}}
{{- $version := .Capabilities.HelmVersion.Version -}}
{{- if semverCompare "<3.10.0-0" $version }}{{ fail (printf "this is Helm %s: the chart needs 3.10 or newer" $version) }}{{ end -}}
{{- end -}}

{{/* Names that Kubernetes refuses: those of Services are DNS labels, and begin with a letter. */}}
{{- define "vitrine.checkNames" -}}
{{- if and .Values.fullnameOverride .Values.nameOverride -}}
{{- fail "nameOverride does nothing beside fullnameOverride, which is the whole name: leave one of them out" -}}
{{- end -}}
{{- $base := include "vitrine.base" . -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $base) -}}
{{- fail (printf "Kubernetes refuses Services named %q: names begin with a letter and have only a-z, 0-9 and -; set fullnameOverride" $base) -}}
{{- end -}}
{{- end -}}

{{/* No image of ours is published, and one without a registry would be looked for on Docker Hub. */}}
{{- define "vitrine.checkImages" -}}
{{- $root := . -}}
{{- $images := list -}}
{{- if eq .Values.mode "rayservice" -}}
{{- $images = list .Values.images.ray -}}
{{- else -}}
{{- /* Hooks of Helm run the encoder's. */ -}}
{{- $images = list .Values.images.encoder -}}
{{- range (include "vitrine.pools" . | fromYaml).pools -}}
{{- $images = append $images (default (index $root.Values.images .program) .settings.image) -}}
{{- end -}}
{{- end -}}
{{- range uniq $images -}}
{{- if not (or $root.Values.images.registry (contains "/" .)) -}}
{{- fail (printf "images.registry is required, as there is no published image %s: build it with deploy/docker, push it, and --set images.registry=registry.example.com/team (docker.io/library for images that nodes have already)" .) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Values that count only together with another. */}}
{{- define "vitrine.checkUnused" -}}
{{- $values := .Values -}}
{{- $policy := $values.networkPolicy -}}
{{- if ne (include "vitrine.hasNetworkPolicy" .) "true" -}}
{{- range list "clients" "encoderClients" "metricsFrom" "probesFrom" "extraEgress" -}}
{{- if index $policy . }}{{ fail (printf "networkPolicy.%s does nothing without networkPolicy.enabled: set that, or leave it out" .) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- $encoders := $values.tls.encoders -}}
{{- if and $encoders.clientSecretName (not $encoders.secretName) -}}
{{- fail "tls.encoders.clientSecretName does nothing without tls.encoders.secretName: encoders serve without TLS" -}}
{{- end -}}
{{- if and (or $encoders.allowedPeers (ne $encoders.sharedPoolPeers "*")) (not $encoders.clientAuth) -}}
{{- fail "tls.encoders.allowedPeers and sharedPoolPeers are names in certificates of clients, and nothing without tls.encoders.clientAuth" -}}
{{- end -}}
{{- $monitor := $values.monitoring.serviceMonitor -}}
{{- $needsKey := and $monitor.enabled (eq $values.mode "rayservice") $values.accessKeys.secretName -}}
{{- if and $needsKey (not $monitor.apiKeySecretName) -}}
{{- fail "monitoring.serviceMonitor.apiKeySecretName is required in mode rayservice with accessKeys: Ray's door shows metrics to those with a key alone; make a Secret with a key of Prometheus's own" -}}
{{- end -}}
{{- if and $monitor.apiKeySecretName (not $needsKey) -}}
{{- fail "monitoring.serviceMonitor.apiKeySecretName does nothing without its enabled, mode rayservice and accessKeys: other metrics need no key" -}}
{{- end -}}
{{- $cache := $values.modelCache -}}
{{- if and $cache.hostPath (ne $cache.kind "hostPath") -}}
{{- fail (printf "modelCache.hostPath does nothing with modelCache.kind %s: set hostPath there" $cache.kind) -}}
{{- end -}}
{{- if and (or $cache.existingClaim $cache.storageClassName) (ne $cache.kind "persistentVolumeClaim") -}}
{{- fail (printf "modelCache.existingClaim and storageClassName do nothing with modelCache.kind %s: set persistentVolumeClaim there" $cache.kind) -}}
{{- end -}}
{{- end -}}

{{/* Sections that only one mode or engine uses. */}}
{{- define "vitrine.checkSections" -}}
{{- $values := .Values -}}
{{- $engine := $values.engine -}}
{{- $unused := dict -}}
{{- if ne $values.mode "rayservice" }}{{ $_ := set $unused "ray" (printf "mode %s has none of Ray's pods" $values.mode) }}{{ end -}}
{{- if ne $engine "vllm" }}{{ $_ := set $unused "vllm" (printf "engine is %s" $engine) }}{{ end -}}
{{- if ne $engine "sglang" }}{{ $_ := set $unused "sglang" (printf "engine is %s" $engine) }}{{ end -}}
{{- if ne (include "vitrine.hasGateway" .) "true" }}{{ $_ := set $unused "gateway" "only engine vllm in mode M has one" }}{{ end -}}
{{- if not $values.colocation.enabled }}{{ $_ := set $unused "colocation" "colocation.enabled is off" }}{{ end -}}
{{- $defaults := (.Files.Get "files/checks/known.yaml" | fromYaml).defaults -}}
{{- range $section, $why := $unused -}}
{{- range $name, $value := index $values $section -}}
{{- if ne (toYaml $value) (index $defaults $section $name | toYaml) }}{{ fail (printf "%s.%s does nothing, as %s: leave it out" $section $name $why) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Where the model is, and whether it can be downloaded there before pods start. */}}
{{- define "vitrine.checkModel" -}}
{{- $model := include "vitrine.model" . -}}
{{- $cache := .Values.modelCache -}}
{{- if $cache.download.enabled -}}
{{- if not (and (eq $cache.kind "persistentVolumeClaim") $cache.existingClaim) -}}
{{- fail "modelCache.download needs a claim that is there before the release: set modelCache.kind persistentVolumeClaim and existingClaim" -}}
{{- end -}}
{{- if hasPrefix "/" $model -}}
{{- fail (printf "modelCache.download: model %s is a folder, which needs no download; leave it off" .Values.model) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Fields of the users' Service that its type does not have, and a route from nowhere. */}}
{{- define "vitrine.checkService" -}}
{{- $service := .Values.service -}}
{{- if and .Values.httpRoute.enabled (not .Values.httpRoute.parentRefs) -}}
{{- fail "httpRoute.parentRefs is required with httpRoute.enabled, for example [{name: my-gateway}]" -}}
{{- end -}}
{{- $nodePorts := or $service.nodePorts.http $service.nodePorts.grpc -}}
{{- if and (eq $service.type "ClusterIP") (or $nodePorts $service.externalTrafficPolicy) -}}
{{- fail "service.nodePorts and externalTrafficPolicy do nothing with service.type ClusterIP: set NodePort or LoadBalancer" -}}
{{- end -}}
{{- if and $service.nodePorts.grpc (ne .Values.engine "vitrine") -}}
{{- fail (printf "service.nodePorts.grpc: users of engine %s have HTTP alone; leave it out" .Values.engine) -}}
{{- end -}}
{{- if and (or $service.loadBalancerClass $service.loadBalancerSourceRanges) (ne $service.type "LoadBalancer") -}}
{{- fail (printf "service.loadBalancerClass and loadBalancerSourceRanges do nothing with service.type %s: set LoadBalancer" $service.type) -}}
{{- end -}}
{{- end -}}

{{/* Settings that a service does not have, or that the chart sets itself: (list $ where program settings). */}}
{{- define "vitrine.checkSettings" -}}
{{- $root := index . 0 -}}
{{- $where := index . 1 -}}
{{- $program := index . 2 -}}
{{- $settings := index . 3 -}}
{{- include "vitrine.checkConfig" (list $root (printf "%s.config" $where) $program $settings.config) -}}
{{- range $settings.extraArgs -}}
{{- $name := regexReplaceAll "^--(no-)?" (splitList "=" . | first) "" | replace "-" "_" -}}
{{- if hasPrefix "--" . }}{{ include "vitrine.checkSetting" (list $root (printf "%s.extraArgs: %s" $where .) $name) }}{{ end -}}
{{- end -}}
{{- $prefix := printf "VITRINE_%s_" (upper $program) -}}
{{- range $variable, $_ := $settings.env -}}
{{- if hasPrefix $prefix $variable -}}
{{- include "vitrine.checkSetting" (list $root (printf "%s.env.%s" $where $variable) (trimPrefix $prefix $variable | lower)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* (list $ where program config) */}}
{{- define "vitrine.checkConfig" -}}
{{- $root := index . 0 -}}
{{- $where := index . 1 -}}
{{- $program := index . 2 -}}
{{- $known := index ($root.Files.Get "files/checks/known.yaml" | fromYaml).settings $program -}}
{{- $list := ternary "docs/vllm.md has all" (printf "vitrine-%s --print-config shows all" $program) (eq $program "connector") -}}
{{- range $name, $_ := index . 3 -}}
{{- include "vitrine.checkSetting" (list $root (printf "%s.%s" $where $name) $name) -}}
{{- if and $known (not (has $name ($known | default list))) }}{{ fail (printf "%s.%s: there is no such setting; %s" $where $name $list) }}{{ end -}}
{{- end -}}
{{- end -}}

{{/* (list $ where name) */}}
{{- define "vitrine.checkSetting" -}}
{{- $own := (index . 0).Files.Get "files/checks/own_settings.yaml" | fromYaml -}}
{{- with index $own (index . 2) }}{{ fail (printf "%s is not for values: %s" (index $ 1) .) }}{{ end -}}
{{- end -}}

{{/* Labels that the chart sets: (list where labels). */}}
{{- define "vitrine.checkLabels" -}}
{{- $ours := list "helm.sh/chart" "vitrine/pool" "vitrine/users" "vitrine/scrape" -}}
{{- range list "name" "instance" "component" "version" "managed-by" }}{{ $ours = append $ours (printf "app.kubernetes.io/%s" .) }}{{ end -}}
{{- $where := index . 0 -}}
{{- range $name, $_ := index . 1 -}}
{{- if has $name $ours }}{{ fail (printf "%s: label %s is the chart's own, by which pods are found: take another name" $where $name) }}{{ end -}}
{{- end -}}
{{- end -}}

{{/* A pod has as many GPUs as its program uses: (list where program gpuSharing settings). */}}
{{- define "vitrine.checkGpus" -}}
{{- $where := index . 0 -}}
{{- $program := index . 1 -}}
{{- $settings := index . 3 -}}
{{- $names := index (dict "encoder" list "llm" (list "tp") "vllm" (list "tensor_parallel_size" "pipeline_parallel_size" "data_parallel_size") "sglang" (list "tp_size" "pp_size")) $program -}}
{{- $used := 1 -}}
{{- range $names }}{{ $used = mul $used (index $settings.config . | default 1 | int) }}{{ end -}}
{{- range $settings.extraArgs -}}
{{- $flag := splitList "=" . | first | trimPrefix "--" | replace "-" "_" -}}
{{- if has $flag $names }}{{ fail (printf "%s.extraArgs: %s says how many GPUs a pod uses: set config.%s, which gpu.count is compared with" $where . $flag) }}{{ end -}}
{{- end -}}
{{- $prefix := printf "VITRINE_%s_" (upper $program) -}}
{{- range $variable, $_ := $settings.env -}}
{{- $setting := trimPrefix $prefix $variable | lower -}}
{{- if and (hasPrefix $prefix $variable) (has $setting $names) }}{{ fail (printf "%s.env.%s says how many GPUs a pod uses: set config.%s, which gpu.count is compared with" $where $variable $setting) }}{{ end -}}
{{- end -}}
{{- /* Replicas of SGLang's attention may share GPUs or not. A claim has its own count. */ -}}
{{- $isCountable := and (ne (index . 2) "resourceClaim") (not (hasKey $settings.config "dp_size")) -}}
{{- $count := $settings.gpu.count -}}
{{- if and $isCountable $count (ne (int $count) (int $used)) -}}
{{- $advice := ternary "an encoder uses one GPU: set gpu.count 1, and replicas for more" (printf "set config.%s and gpu.count alike" (first $names)) (eq $program "encoder") -}}
{{- fail (printf "%s has gpu.count %v, but its pods use %d: %s" $where $count (int $used) $advice) -}}
{{- end -}}
{{- end -}}

{{/*
(list where autoscaling). A pool without pods has no metrics by which it could be scaled, so that something else must show that
there are requests.
*/}}
{{- define "vitrine.checkScaling" -}}
{{- $scaling := index . 1 -}}
{{- if and $scaling.triggers (ne $scaling.kind "keda") -}}
{{- fail (printf "%s.autoscaling.triggers are KEDA's: set kind keda, or leave them out" (index . 0)) -}}
{{- end -}}
{{- if not (or $scaling.minReplicas (and (eq $scaling.kind "keda") $scaling.triggers)) -}}
{{- fail (printf "%s.autoscaling.minReplicas 0: a pool without pods has no metric that could start one; set kind keda, and in triggers something that sees requests outside of the pool, such as an ingress' metric or a cron" (index . 0)) -}}
{{- end -}}
{{- if and (ne $scaling.kind "none") (gt (int $scaling.minReplicas) (int $scaling.maxReplicas)) -}}
{{- fail (printf "%s.autoscaling: minReplicas %v is more than maxReplicas %v" (index . 0) $scaling.minReplicas $scaling.maxReplicas) -}}
{{- end -}}
{{- end -}}

{{/* (list where workload) */}}
{{- define "vitrine.checkRole" -}}
{{- $where := index . 0 -}}
{{- $workload := index . 1 -}}
{{- $settings := $workload.settings -}}
{{- if and (eq $workload.gpuSharing "runtimeClass") $settings.runtimeClassName -}}
{{- fail (printf "%s.runtimeClassName does nothing with colocation.gpuSharing runtimeClass: set colocation.runtimeClassName" $where) -}}
{{- end -}}
{{- if eq $workload.component "llm" -}}
{{- if and (eq $settings.role "decode") $settings.encoderPools -}}
{{- fail (printf "%s.encoderPools: a pool of role decode uses no encoders, its prefill pools do; leave it out" $where) -}}
{{- end -}}
{{- if and (ne $settings.role "decode") $settings.prefillPools -}}
{{- fail (printf "%s.prefillPools: only pools of role decode use prefill pools, this one has role %s; leave it out" $where $settings.role) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What mode rayservice does not use, and more GPUs than its pods may have. */}}
{{- define "vitrine.checkRay" -}}
{{- $root := . -}}
{{- $values := .Values -}}
{{- $workers := $values.ray.workers -}}
{{- if gt (int $workers.minReplicas) (int $workers.maxReplicas) -}}
{{- fail (printf "ray.workers.minReplicas %v is more than maxReplicas %v" $workers.minReplicas $workers.maxReplicas) -}}
{{- end -}}
{{- $defaults := (.Files.Get "files/checks/known.yaml" | fromYaml).defaults -}}
{{- range list "discovery" "service" "preStopSleepSeconds" "keda" -}}
{{- if ne (index $values . | toYaml) (index $defaults . | toYaml) -}}
{{- fail (printf "mode rayservice does not use %s: Services, addresses and the end of pods are KubeRay's; leave it out" .) -}}
{{- end -}}
{{- end -}}
{{- if .Values.networkPolicy.encoderClients -}}
{{- fail "mode rayservice does not use networkPolicy.encoderClients: name in networkPolicy.clients who may call port 9000" -}}
{{- end -}}
{{- include "vitrine.checkLabels" (list "ray.head.podLabels" $values.ray.head.podLabels) -}}
{{- include "vitrine.checkLabels" (list "ray.workers.podLabels" $workers.podLabels) -}}
{{- $gpus := 0 -}}
{{- range $key, $program := dict "encoders" "encoder" "llm" "llm" -}}
{{- $pool := include "vitrine.rayPool" (list $root $key) | fromYaml -}}
{{- include "vitrine.checkRayPool" (list $key $pool (index $defaults $key).defaults) -}}
{{- include "vitrine.checkSettings" (list $root $key $program $pool) -}}
{{- range list "metrics_host" "metrics_client_auth" -}}
{{- if hasKey $pool.config . }}{{ fail (printf "%s.config.%s is not for values in mode rayservice: each replica has its own port of metrics" $key .) }}{{ end -}}
{{- end -}}
{{- include "vitrine.checkGpus" (list $key $program "none" $pool) -}}
{{- include "vitrine.checkScaling" (list $key $pool.autoscaling) -}}
{{- $replicas := ternary $pool.autoscaling.minReplicas $pool.replicas (eq $pool.autoscaling.kind "ray") -}}
{{- $gpus = add $gpus (mul (int $replicas) (int $pool.gpu.count)) -}}
{{- end -}}
{{- $there := mul (int $workers.maxReplicas) (int $workers.gpu.count) -}}
{{- if gt $gpus $there -}}
{{- fail (printf "mode rayservice: replicas of encoders and llm need %d GPUs, but ray.workers have %d: %v pods with %v each" $gpus $there $workers.maxReplicas $workers.gpu.count) -}}
{{- end -}}
{{- end -}}

{{/* A pool's keys that are for pods of its own, which Ray's replicas do not have: (list key pool defaults). */}}
{{- define "vitrine.checkRayPool" -}}
{{- $key := index . 0 -}}
{{- $pool := omit (index . 1) "replicas" "config" "drainTimeoutSeconds" -}}
{{- $defaults := index . 2 -}}
{{- range $name, $value := $pool -}}
{{- $default := index $defaults $name -}}
{{- if eq $name "gpu" -}}
{{- $value = omit $value "count" -}}
{{- $default = omit $default "count" -}}
{{- else if eq $name "autoscaling" -}}
{{- $value = pick $value "behavior" "triggers" -}}
{{- $default = pick $default "behavior" "triggers" -}}
{{- end -}}
{{- if and (or $value $default) (ne (toYaml $value) (toYaml $default)) -}}
{{- fail (printf "mode rayservice does not use %s.%s: its replicas run in pods of ray.workers and ray.head; set it there, where they have it" $key $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
