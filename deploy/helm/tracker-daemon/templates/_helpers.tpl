{{- define "tracker-daemon.name" -}}
{{- if contains "tracker-daemon" .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}{{ else }}{{ printf "%s-tracker-daemon" .Release.Name | trunc 50 | trimSuffix "-" }}{{ end }}
{{- end }}

{{- define "tracker-daemon.selector" -}}
app.kubernetes.io/name: tracker-daemon
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "tracker-daemon.labels" -}}
{{ include "tracker-daemon.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "tracker-daemon.image" -}}
{{- with .Values.image -}}
{{- if .digest }}{{ .repository }}@{{ .digest }}{{ else }}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{ end }}
{{- end }}
{{- end }}

{{- define "tracker-daemon.tokenSecret" -}}
{{- if .Values.token.create }}{{ include "tracker-daemon.name" . }}-token{{ else }}{{ .Values.token.existingSecret }}{{ end }}
{{- end }}

{{/* The settings, as environment variables. */}}
{{- define "tracker-daemon.settings" -}}
{{- if .Values.database.embedded }}
TRACKER_DATABASE: embedded:/var/lib/tracker/postgres
{{- else }}
TRACKER_DATABASE_FILE: /etc/tracker-daemon/database
{{- end }}
TRACKER_TOKEN_FILE: /etc/tracker-daemon/token
TRACKER_LISTEN: unix:/run/tracker-daemon/tracker.sock 0.0.0.0:{{ .Values.port }}
{{- if .Values.journal.enabled }}
TRACKER_JOURNAL: /var/lib/tracker/journal
{{- end }}
TRACKER_SHUTDOWN_TIMEOUT: {{ .Values.shutdownTimeout | quote }}
TRACKER_LINGER: {{ .Values.linger | quote }}
{{- range $name, $value := .Values.settings }}
{{- /* Numbers of a values file are floats, and 2000000 would come out as 2e+06. */}}
TRACKER_{{ $name }}: {{ if and (kindIs "float64" $value) (eq (floor $value) $value) }}{{ printf "%.0f" $value | quote }}{{ else }}{{ $value | toString | quote }}{{ end }}
{{- end }}
{{- end }}

{{- define "tracker-daemon.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "tracker-daemon.security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* The daemon's container; as a sidecar it goes among the init containers. */}}
{{- define "tracker-daemon.container" -}}
{{- $sidecar := eq .Values.mode "sidecar" -}}
- name: tracker-daemon
  image: {{ include "tracker-daemon.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  {{- if $sidecar }}
  restartPolicy: Always
  {{- end }}
  args: [serve]
  envFrom:
    - configMapRef:
        name: {{ include "tracker-daemon.name" . }}
  {{- with .Values.extraEnv }}
  env:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  ports:
    - name: tracker
      containerPort: {{ .Values.port }}
  startupProbe:
    httpGet: {path: /livez, port: {{ .Values.port }}}
    periodSeconds: 2
    timeoutSeconds: 5
    failureThreshold: {{ div .Values.probes.startupSeconds 2 }}
  livenessProbe:
    httpGet: {path: /livez, port: {{ .Values.port }}}
    periodSeconds: 10
    timeoutSeconds: 5
    failureThreshold: 3
  readinessProbe:
    httpGet: {path: {{ .Values.probes.readiness | default (ternary "/livez" "/readyz" (or $sidecar .Values.journal.enabled)) }}, port: {{ .Values.port }}}
    periodSeconds: 5
    timeoutSeconds: 5
    failureThreshold: 2
  {{- if not $sidecar }}
  lifecycle:
    preStop:
      exec:
        command: [sleep, {{ .Values.preStop | quote }}]
  {{- end }}
  securityContext:
    {{- include "tracker-daemon.security" . | nindent 4 }}
  resources:
    {{- toYaml .Values.resources | nindent 4 }}
  volumeMounts:
    - name: journal
      mountPath: /var/lib/tracker
    - name: socket
      mountPath: /run/tracker-daemon
    - name: secrets
      mountPath: /etc/tracker-daemon
      readOnly: true
    {{- with .Values.extraVolumeMounts }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
{{- end }}

{{/* Its volumes but the journal's. */}}
{{- define "tracker-daemon.volumes" -}}
- name: socket
  emptyDir:
    medium: Memory
    sizeLimit: 1Mi
- name: secrets
  projected:
    defaultMode: 0440
    sources:
      {{- if not .Values.database.embedded }}
      - secret:
          name: {{ .Values.database.existingSecret }}
          items:
            - key: {{ .Values.database.key }}
              path: database
      {{- end }}
      {{- include "tracker-daemon.tokenSource" . | nindent 6 }}
{{- with .Values.extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "tracker-daemon.tokenSource" -}}
- secret:
    name: {{ include "tracker-daemon.tokenSecret" . }}
    items:
      - key: {{ .Values.token.key }}
        path: token
{{- end }}

{{- define "tracker-daemon.pod" -}}
{{- $need := add (mul 2 .Values.shutdownTimeout) .Values.preStop .Values.linger -}}
{{- if le (int .Values.terminationGracePeriod) (int $need) }}
{{- fail (printf "terminationGracePeriod must be longer than preStop, twice shutdownTimeout and linger: more than %d" (int $need)) }}
{{- end -}}
{{- if and .Values.database.embedded (gt (int .Values.replicas) 1) }}
{{- fail (printf "database.embedded is a PostgreSQL in each pod, with sums of its own: replicas must be 1, not %d" (int .Values.replicas)) }}
{{- end -}}
{{- if and .Values.podMonitor.enabled (hasSuffix "s" .Values.podMonitor.interval) (le (int .Values.linger) (int (trimSuffix "s" .Values.podMonitor.interval))) }}
{{- fail (printf "linger, %d s, must be longer than podMonitor.interval, %s: else no scrape sees the calls that a drain has lost" (int .Values.linger) .Values.podMonitor.interval) }}
{{- end -}}
metadata:
  labels:
    {{- include "tracker-daemon.selector" . | nindent 4 }}
    tracker-daemon/scrape: "true"
    {{- with .Values.podLabels }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  annotations:
    checksum/config: {{ include "tracker-daemon.settings" . | sha256sum }}
    {{- with .Values.podAnnotations }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
spec:
  serviceAccountName: {{ include "tracker-daemon.name" . }}
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ .Values.terminationGracePeriod }}
  securityContext:
    {{- include "tracker-daemon.podSecurity" . | nindent 4 }}
  {{- range $name := list "imagePullSecrets" "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" }}
  {{- with index $.Values $name }}
  {{ $name }}:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- end }}
  {{- if eq .Values.mode "sidecar" }}
  initContainers:
    {{- include "tracker-daemon.container" . | nindent 4 }}
  containers:
    - name: chat-server
      image: {{ required "mode sidecar needs chatServer.image" .Values.chatServer.image }}
      {{- range $name := list "command" "args" "env" "envFrom" "startupProbe" "livenessProbe" "readinessProbe" }}
      {{- with index $.Values.chatServer $name }}
      {{ $name }}:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- end }}
      ports:
        - name: chat
          containerPort: {{ .Values.chatServer.port }}
      lifecycle:
        preStop:
          exec:
            command: [sleep, {{ .Values.preStop | quote }}]
      securityContext:
        {{- include "tracker-daemon.security" . | nindent 8 }}
      resources:
        {{- toYaml .Values.chatServer.resources | nindent 8 }}
      volumeMounts:
        - name: socket
          mountPath: /run/tracker-daemon
        - name: token
          mountPath: /etc/tracker-daemon
          readOnly: true
        {{- with .Values.chatServer.volumeMounts }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
  {{- else }}
  containers:
    {{- include "tracker-daemon.container" . | nindent 4 }}
  {{- end }}
  volumes:
    {{- include "tracker-daemon.volumes" . | nindent 4 }}
    {{- if eq .Values.mode "sidecar" }}
    - name: token
      projected:
        defaultMode: 0440
        sources:
          {{- include "tracker-daemon.tokenSource" . | nindent 10 }}
    {{- end }}
    {{- if or (eq .Values.mode "sidecar") (not .Values.journal.enabled) }}
    - name: journal
      emptyDir:
        sizeLimit: {{ .Values.journal.size }}
    {{- end }}
{{- end }}
