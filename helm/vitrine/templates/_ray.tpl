{{/* What a RayService needs. */}}

{{/* The application's configuration, of Ray Serve's ServeDeploySchema; `args` are those of deploy/ray_serve. */}}
{{- define "vitrine.serveConfig" -}}
{{- if or .Values.tls.encoders.secretName .Values.tls.llm.secretName -}}
{{- fail "mode rayservice serves without TLS: leave tls empty, and put what ends TLS in front" -}}
{{- end -}}
{{- if .Values.colocation.enabled -}}
{{- fail "mode rayservice has encoders and workers in the same pods: leave colocation off" -}}
{{- end -}}
proxy_location: EveryNode
http_options: {host: 0.0.0.0, port: 8000}
grpc_options:
  port: 9000
  grpc_servicer_functions:
    - vitrine_vlm.protos.encoder.v1.encoder_pb2_grpc.add_EncoderServicer_to_server
    - grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server
applications:
  - name: vitrine
    route_prefix: /
    import_path: vitrine_vlm.deploy.ray_serve.application:build
    args:
      model: {{ include "vitrine.model" . | quote }}
      encoders:
        {{- include "vitrine.servePool" (list . "encoders" "target_queue_s") | nindent 8 }}
      llm:
        {{- include "vitrine.servePool" (list . "llm" "target_queued_tokens") | nindent 8 }}
      gateway:
        num_replicas: {{ .Values.ray.gatewayReplicas }}
{{- end -}}

{{/* The only pool of `encoders` or `llm`: (list $ key). */}}
{{- define "vitrine.rayPool" -}}
{{- $key := index . 1 -}}
{{- $values := index (index . 0).Values $key -}}
{{- if ne (len $values.pools) 1 -}}
{{- fail (printf "mode rayservice has one pool of each kind, but %s.pools has %d" $key (len $values.pools)) -}}
{{- end -}}
{{- mergeOverwrite (deepCopy $values.defaults) (deepCopy (values $values.pools | first | default dict)) | toYaml -}}
{{- end -}}

{{/* Arguments for it: (list $ key targetName). */}}
{{- define "vitrine.servePool" -}}
{{- $root := index . 0 -}}
{{- $key := index . 1 -}}
{{- $pool := include "vitrine.rayPool" . | fromYaml -}}
{{- $scaling := $pool.autoscaling -}}
{{- if has $scaling.kind (list "hpa" "keda") -}}
{{- fail (printf "mode rayservice scales by Ray: %s autoscaling.kind must be none or ray, not %s" $key $scaling.kind) -}}
{{- end -}}
num_gpus: {{ $pool.gpu.count }}
{{- if eq $scaling.kind "ray" }}
min_replicas: {{ $scaling.minReplicas }}
max_replicas: {{ $scaling.maxReplicas }}
{{ index . 2 }}: {{ (first (include "vitrine.scaling" (list $root (dict "program" (ternary "encoder" "llm" (eq $key "encoders")) "settings" $pool)) | fromYaml).metrics).target }}
{{- else }}
min_replicas: {{ $pool.replicas }}
max_replicas: {{ $pool.replicas }}
{{- end }}
settings:
  drain_timeout_s: {{ $pool.drainTimeoutSeconds }}
  log_level: {{ $root.Values.log.level }}
  log_format: {{ $root.Values.log.format }}
  {{- with $root.Values.revision }}
  revision: {{ . | quote }}
  {{- end }}
  {{- with $root.Values.servedModelName }}
  served_model_name: {{ . | quote }}
  {{- end }}
  {{- with $root.Values.otlpEndpoint }}
  otlp_endpoint: {{ . | quote }}
  {{- end }}
  {{- if and (eq $key "llm") $root.Values.accessKeys.secretName }}
  api_keys_file: /etc/vitrine/keys/keys.yaml
  {{- end }}
  {{- with $pool.config }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* Whether Ray adds and removes pods. */}}
{{- define "vitrine.rayAutoscales" -}}
{{- gt (int .Values.ray.workers.maxReplicas) (int .Values.ray.workers.minReplicas) -}}
{{- end -}}

{{/* Pod template of head or workers: (list $ containerName values ports). */}}
{{- define "vitrine.rayPodTemplate" -}}
{{- $root := index . 0 -}}
{{- $name := index . 1 -}}
{{- $group := index . 2 -}}
{{- $values := $root.Values -}}
metadata:
  labels:
    {{- $own := include "vitrine.selectorLabels" (list $root "ray") | fromYaml }}
    {{- if eq $name "ray-head" }}{{ $_ := set $own "vitrine/scrape" "true" }}{{ end }}
    {{- merge $own $group.podLabels $values.commonLabels | toYaml | nindent 4 }}
  {{- with $group.podAnnotations }}
  annotations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ include "vitrine.serviceAccountName" (list $root "ray") }}
  # KubeRay's autoscaler runs in the head's pod and asks the API server for pods.
  automountServiceAccountToken: {{ and (eq $name "ray-head") (eq (include "vitrine.rayAutoscales" $root) "true") }}
  enableServiceLinks: false
  {{- $encoder := include "vitrine.rayPool" (list $root "encoders") | fromYaml }}
  {{- $llm := include "vitrine.rayPool" (list $root "llm") | fromYaml }}
  # A replica first waits for its requests, then for its process to drain, with 5 s to spare each time.
  terminationGracePeriodSeconds: {{ add (mul 2 (add (max $encoder.drainTimeoutSeconds $llm.drainTimeoutSeconds) 5)) 10 }}
  securityContext:
    {{- toYaml $values.podSecurityContext | nindent 4 }}
  {{- with $values.images.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with $group.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- include "vitrine.podFields" $group | nindent 2 }}
  {{- with $group.topologySpreadConstraints }}
  topologySpreadConstraints:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ $name }}
      image: {{ include "vitrine.image" (list $root $values.images.ray (default $root.Chart.AppVersion $values.images.tag)) }}
      imagePullPolicy: {{ $values.images.pullPolicy }}
      env:
        {{- include "vitrine.commonEnv" $root | nindent 8 }}
        {{- with $group.env }}
        {{- include "vitrine.envOf" . | nindent 8 | trimPrefix "\n        " }}
        {{- end }}
      {{- with $group.envFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with index . 3 }}
      ports:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      resources:
        {{- $resources := deepCopy $group.resources }}
        {{- with $group.gpu }}
        {{- if .count }}
        {{- $_ := set $resources "limits" (set ($resources.limits | default dict) .resource .count) }}
        {{- end }}
        {{- end }}
        {{- toYaml $resources | nindent 8 }}
      securityContext:
        {{- toYaml $values.containerSecurityContext | nindent 8 }}
      volumeMounts:
        {{- include "vitrine.commonVolumeMounts" $root | nindent 8 }}
        - {name: shm, mountPath: /dev/shm}
        {{- if $values.accessKeys.secretName }}
        - {name: keys, mountPath: /etc/vitrine/keys, readOnly: true}
        {{- end }}
        {{- with $group.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    {{- with $group.extraContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    {{- include "vitrine.commonVolumes" $root | nindent 4 }}
    # Ray's object store and the encoders' pools; Kubernetes gives 64 MiB.
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ $values.ray.sharedMemorySize }}
    {{- if $values.accessKeys.secretName }}
    - name: keys
      {{- include "vitrine.keysVolume" $root | nindent 6 }}
    {{- end }}
    {{- with $group.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}
