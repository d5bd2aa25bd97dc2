{{/* A pool's pod template: (list $ workload). */}}
{{- define "vitrine.podTemplate" -}}
{{- $root := index . 0 -}}
{{- $workload := index . 1 -}}
{{- $values := $root.Values -}}
{{- $settings := $workload.settings -}}
{{- $isUsers := and (eq $workload.component "llm") (ne ($settings.role | default "") "prefill") -}}
{{- $asksApiServer := and (eq $values.discovery "kubernetes") (ne $workload.program "encoder") (ne $workload.program "sglang") -}}
{{- $sharing := $workload.gpuSharing -}}
{{- $sharedMemory := and $values.colocation.sharedMemoryHostPath (ne $workload.program "gateway") -}}
{{- $takesKeys := eq (include "vitrine.takesKeys" .) "true" -}}
{{- $usesEncoderTls := and $workload.usesEncoders $values.tls.encoders.secretName -}}
metadata:
  labels:
    # Not the chart's version: another chart alone must not restart pods.
    {{- merge (include "vitrine.poolSelectorLabels" . | fromYaml) $settings.podLabels $values.commonLabels | toYaml | nindent 4 }}
    {{- if $isUsers }}
    vitrine/users: "true"
    {{- end }}
  annotations:
    # The settings, which services read once, at the start: in the template, so that pods of each ReplicaSet have their own.
    vitrine/config: |
      {{- include "vitrine.config" . | nindent 6 }}
    {{- with $settings.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "vitrine.serviceAccountName" (list $root $workload.component) }}
  automountServiceAccountToken: {{ $asksApiServer }}
  # VITRINE_ENCODER_PORT and the like, made for Services, would be read as settings.
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add $values.preStopSleepSeconds $settings.drainTimeoutSeconds 10 }}
  securityContext:
    {{- toYaml $values.podSecurityContext | nindent 4 }}
  {{- with $values.images.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  {{- with eq $sharing "runtimeClass" | ternary $values.colocation.runtimeClassName $settings.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- if eq $sharing "resourceClaim" }}
  resourceClaims:
    - name: gpus
      resourceClaimName: {{ include "vitrine.resourceClaimName" $root }}
  {{- end }}
  {{- include "vitrine.podFields" $settings | nindent 2 }}
  {{- with include "vitrine.affinity" . }}
  affinity:
    {{- . | nindent 4 }}
  {{- end }}
  {{- with include "vitrine.topologySpreadConstraints" . }}
  topologySpreadConstraints:
    {{- . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ $workload.component }}
      image: {{ include "vitrine.programImage" . }}
      imagePullPolicy: {{ $values.images.pullPolicy }}
      {{- include "vitrine.command" . | nindent 6 }}
      env:
        {{- include "vitrine.env" . | nindent 8 }}
      {{- with $settings.envFrom }}
      envFrom:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      ports:
        {{- range include "vitrine.ports" . | fromYamlArray }}
        - {name: {{ .name }}, containerPort: {{ .port }}}
        {{- end }}
      {{- include "vitrine.probes" . | nindent 6 }}
      {{- if $values.preStopSleepSeconds }}
      lifecycle:
        preStop:
          sleep:
            seconds: {{ $values.preStopSleepSeconds }}
      {{- end }}
      resources:
        {{- include "vitrine.resources" . | nindent 8 }}
      securityContext:
        {{- toYaml $values.containerSecurityContext | nindent 8 }}
      volumeMounts:
        - {name: config, mountPath: /etc/vitrine/config, readOnly: true}
        {{- include "vitrine.volumeMounts" . | nindent 8 }}
        {{- if $workload.tls.secretName }}
        - {name: tls, mountPath: /etc/vitrine/tls, readOnly: true}
        {{- end }}
        {{- if $takesKeys }}
        - {name: keys, mountPath: /etc/vitrine/keys, readOnly: true}
        {{- end }}
        {{- if $usesEncoderTls }}
        - {name: encoder-tls, mountPath: /etc/vitrine/encoder-tls, readOnly: true}
        {{- end }}
        {{- if $sharedMemory }}
        - {name: shm, mountPath: /var/run/vitrine/shm}
        {{- end }}
        {{- with $settings.extraVolumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
    {{- with $settings.extraContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    - name: config
      downwardAPI:
        items:
          - path: config.yaml
            fieldRef:
              fieldPath: metadata.annotations['vitrine/config']
    {{- include "vitrine.volumes" . | nindent 4 }}
    {{- with $workload.tls.secretName }}
    - name: tls
      secret:
        secretName: {{ . }}
        defaultMode: 0440
    {{- end }}
    {{- if $takesKeys }}
    - name: keys
      {{- include "vitrine.keysVolume" $root | nindent 6 }}
    {{- end }}
    {{- if $usesEncoderTls }}
    - name: encoder-tls
      secret:
        secretName: {{ default $values.tls.encoders.secretName $values.tls.encoders.clientSecretName }}
        defaultMode: 0440
        items:
          - {key: ca.crt, path: ca.crt}
          {{- if $values.tls.encoders.clientAuth }}
          - {key: tls.crt, path: tls.crt}
          - {key: tls.key, path: tls.key}
          {{- end }}
    {{- end }}
    {{- if $sharedMemory }}
    - name: shm
      hostPath:
        path: {{ $values.colocation.sharedMemoryHostPath }}
        type: Directory
    {{- end }}
    {{- with $settings.extraVolumes }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* What a pod's spec has as the values say it, also in a RayService: the settings. */}}
{{- define "vitrine.podFields" -}}
{{- range $name := list "priorityClassName" "schedulerName" "nodeSelector" "tolerations" "hostAliases" "dnsConfig" "initContainers" }}
{{- with index $ $name }}
{{ dict $name . | toYaml }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Only the file of keys, whatever else the Secret has. */}}
{{- define "vitrine.keysVolume" -}}
secret:
  secretName: {{ .Values.accessKeys.secretName }}
  defaultMode: 0440
  items:
    - {key: keys.yaml, path: keys.yaml}
{{- end -}}

{{/* Environment of a pool's container: (list $ workload). */}}
{{- define "vitrine.env" -}}
{{- $root := index . 0 -}}
{{- $workload := index . 1 -}}
{{- include "vitrine.programEnv" . }}
{{- if $workload.settings.cudaVisibleDevices }}
# All containers must number the GPUs alike.
- name: CUDA_DEVICE_ORDER
  value: PCI_BUS_ID
- name: CUDA_VISIBLE_DEVICES
  value: {{ $workload.settings.cudaVisibleDevices | quote }}
{{- else if ne $workload.gpuSharing "none" }}
{{- fail (printf "with colocation.gpuSharing a pod sees GPUs of others: cudaVisibleDevices of %s pool %q must say which it uses, its own first" $workload.component $workload.pool) }}
{{- end }}
{{- if eq $workload.gpuSharing "runtimeClass" }}
- name: NVIDIA_VISIBLE_DEVICES
  value: all
- name: NVIDIA_DRIVER_CAPABILITIES
  value: compute,utility,video
{{- end }}
{{- include "vitrine.envOf" $workload.settings.env }}
{{- end -}}

{{/* A map of variables as a list: the map. */}}
{{- define "vitrine.envOf" -}}
{{- range $name, $value := . }}
- name: {{ $name }}
  {{- if kindIs "string" $value }}
  value: {{ $value | quote }}
  {{- else }}
  {{- toYaml $value | nindent 2 }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* What every container that loads a model has, also in a RayService. */}}
{{- define "vitrine.commonEnv" -}}
# The root file system is read-only: checkpoints and compiled kernels go to the model cache.
- name: HOME
  value: /cache
- name: HF_HOME
  value: /cache/huggingface
{{- with .Values.huggingFace.tokenSecretName }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: {{ $.Values.huggingFace.tokenSecretKey }}
{{- end }}
{{- end -}}

{{- define "vitrine.commonVolumeMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: cache, mountPath: /cache}
{{- if include "vitrine.modelClaim" . }}
- {name: models, mountPath: /models, readOnly: true}
{{- end }}
{{- end -}}

{{- define "vitrine.commonVolumes" -}}
{{- $cache := .Values.modelCache -}}
- name: tmp
  emptyDir: {}
- name: cache
  {{- if eq $cache.kind "persistentVolumeClaim" }}
  persistentVolumeClaim:
    claimName: {{ default (include "vitrine.name" (list . "models")) $cache.existingClaim }}
  {{- else if eq $cache.kind "hostPath" }}
  hostPath:
    path: {{ required "modelCache.hostPath is required with modelCache.kind hostPath" $cache.hostPath }}
    type: Directory
  {{- else }}
  emptyDir:
    sizeLimit: {{ $cache.size }}
  {{- end }}
{{- with include "vitrine.modelClaim" . }}
- name: models
  persistentVolumeClaim:
    claimName: {{ . }}
    readOnly: true
{{- end }}
{{- end -}}
