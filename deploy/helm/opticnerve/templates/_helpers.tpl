{{- define "opticnerve.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{/* Labels that select the pods of one pool. Takes a dict of root, kind (gateway, encoder, llm,
     redis) and pool. */}}
{{- define "opticnerve.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .kind }}
opticnerve/pool: {{ .pool }}
{{- end }}

{{- define "opticnerve.labels" -}}
{{ include "opticnerve.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
{{- end }}

{{/* Labels that select all pods of one kind. Takes a dict of root and kind. */}}
{{- define "opticnerve.kind" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .kind }}
{{- end }}

{{- define "opticnerve.image" -}}
{{- $image := .root.Values.image -}}
{{- with $image.registry }}{{ . }}/{{ end }}opticnerve-{{ .kind }}:{{ $image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{/* A pool's settings as JSON: the defaults of its kind, overridden by its own. Takes a dict of
     defaults and pool. */}}
{{- define "opticnerve.pool" -}}
{{- mergeOverwrite (deepCopy .defaults) (.pool | default dict) | toJson -}}
{{- end }}

{{/* The fields that all pods share. Takes a dict of root, kind, pool, settings and graceS. */}}
{{- define "opticnerve.pod" -}}
serviceAccountName: {{ include "opticnerve.name" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ .graceS }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels: {{- include "opticnerve.selector" . | nindent 8 }}
{{- with .settings.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .settings.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "opticnerve.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* Environment variables of the gateway and the workers. `opticnerve health` in workers' probes
     reads those for TLS too. Takes a dict of root, kind and settings. */}}
{{- define "opticnerve.environment" -}}
{{- $values := .root.Values -}}
- name: OPTICNERVE_RPC_TOKEN_FILE
  value: /etc/opticnerve/secrets/rpc-token
{{- with $values.model.name }}
- name: OPTICNERVE_MODEL
  value: {{ . | quote }}
{{- end }}
{{- with $values.model.revision }}
- name: OPTICNERVE_REVISION
  value: {{ . | quote }}
{{- end }}
{{- if $values.model.hubToken.secretName }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ $values.model.hubToken.secretName }}, key: {{ $values.model.hubToken.key }}}
{{- end }}
{{- if $values.tls.enabled }}
- name: OPTICNERVE_TLS_CERTIFICATE
  value: /etc/opticnerve/tls/tls.crt
- name: OPTICNERVE_TLS_KEY
  value: /etc/opticnerve/tls/tls.key
- name: OPTICNERVE_TLS_CA
  value: /etc/opticnerve/tls/ca.crt
- name: OPTICNERVE_TLS_SERVER_NAME
  value: {{ $values.tls.serverName }}
{{- if and $values.tls.mutual (ne .kind "gateway") }}
- name: OPTICNERVE_TLS_CLIENT_CA
  value: /etc/opticnerve/tls/ca.crt
{{- end }}
{{- end }}
{{- with .settings.env }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "opticnerve.mounts" -}}
- name: secrets
  mountPath: /etc/opticnerve/secrets
  readOnly: true
{{- if .root.Values.tls.enabled }}
- name: tls
  mountPath: /etc/opticnerve/tls
  readOnly: true
{{- end }}
- name: models
  mountPath: /models
- name: tmp
  mountPath: /tmp
{{- end }}

{{/* Volumes of the gateway and the workers. Takes a dict of root and secrets: the Secret's keys
     that the service reads. */}}
{{- define "opticnerve.volumes" -}}
- name: secrets
  secret:
    secretName: {{ .root.Values.secretName }}
    defaultMode: 0440
    items:
{{- range .secrets }}
      - {key: {{ . }}, path: {{ . }}}
{{- end }}
{{- if .root.Values.tls.enabled }}
- name: tls
  secret: {secretName: {{ .root.Values.tls.secretName }}, defaultMode: 0440}
{{- end }}
- name: models
{{- with .root.Values.model.volume }}
{{ toYaml . | indent 2 }}
{{- else }}
  emptyDir: {sizeLimit: {{ .root.Values.model.cacheSize }}}
{{- end }}
- name: tmp
  emptyDir: {}
{{- end }}

{{/* A worker's probe. Kubernetes' gRPC probes do not speak TLS and cannot ask whether a worker is
     alive, so `opticnerve health` does. Takes a dict of root and live. */}}
{{- define "opticnerve.ask" -}}
{{- if or .root.Values.tls.enabled .live }}
exec:
  command: [opticnerve, health, {{ if .live }}--live, {{ end }}--timeout=8, "127.0.0.1:7000"]
{{- else }}
grpc: {port: 7000}
{{- end }}
{{- end }}

{{/* A pool's disruption budget: draining nodes evicts one of its pods at a time. */}}
{{- define "opticnerve.budget" -}}
apiVersion: policy/v1
kind: PodDisruptionBudget
metadata:
  name: {{ include "opticnerve.name" .root }}-{{ .pool }}
  labels: {{- include "opticnerve.labels" . | nindent 4 }}
spec:
  maxUnavailable: 1
  selector:
    matchLabels: {{- include "opticnerve.selector" . | nindent 6 }}
{{- end }}
