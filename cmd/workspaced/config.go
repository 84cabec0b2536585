package main

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-viper/mapstructure/v2"
	"github.com/knadh/koanf/parsers/yaml"
	"github.com/knadh/koanf/providers/confmap"
	"github.com/knadh/koanf/providers/env/v2"
	"github.com/knadh/koanf/providers/file"
	"github.com/knadh/koanf/providers/posflag"
	"github.com/knadh/koanf/v2"
	"github.com/spf13/pflag"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/server"
	"github.com/workspaced/workspaced/server/access"
	"github.com/workspaced/workspaced/store"
)

const (
	defaultConfigFile = "/etc/workspaced/workspaced.yaml"
	defaultContainerd = "/run/containerd/containerd.sock"
	envPrefix         = "WORKSPACED_"
)

// config is the daemon's configuration. Each field has one name: `data_dir` in
// the file, WORKSPACED_DATA_DIR in the environment, --data-dir as a flag. Flags
// win over the environment, that over the file, that over the defaults.
type config struct {
	DataDir             string        `koanf:"data_dir" help:"directory of what lasts: database, key, volumes, logs, private containerd's images"`
	KeyURI              string        `koanf:"key_uri" help:"where the key is that protects the database's: file:///PATH, env://NAME, credential://NAME, hcvault://HOST:PORT/MOUNT/keys/KEY, aws-kms://ARN or gcp-kms://NAME (default: the file <data-dir>/workspaced.key)"`
	PreviousKeyURI      string        `koanf:"previous_key_uri" help:"where the key was before key_uri: at the start the database changes from one to the other"`
	StateDir            string        `koanf:"state_dir" help:"directory of what ends with the machine: sockets, FIFOs"`
	Socket              string        `koanf:"socket" help:"unix socket of the API (default <state-dir>/workspaced.sock)"`
	SocketGroup         string        `koanf:"socket_group" help:"group, by name or number, that can open the socket (default: the daemon's own); what it may do, bindings say"`
	Bindings            []string      `koanf:"bindings" help:"who may do what, each SUBJECT ROLE[+ROLE...] [name=ID-OR-PREFIX*] [label=KEY=VALUE]...; subjects: unix:user=, unix:uid=, unix:group=, unix:gid=, unix:socket-group, cert:spiffe://, cert:dns=, cert:cn=, insecure; roles: viewer, operator, secret-writer, admin; root is always an admin"`
	Health              string        `koanf:"health" help:"who may ask how the daemon does (grpc.health.v1): public, authenticated or off"`
	Reflection          string        `koanf:"reflection" help:"who may ask which RPCs there are (grpc.reflection): public, authenticated or off"`
	Listen              string        `koanf:"listen" help:"also serve the API on this TCP address, host:port: with TLS, or on loopback in plain text with --insecure"`
	Insecure            bool          `koanf:"insecure" help:"allow --listen in plain text, on loopback: who sends no token is the subject insecure, who may do what --bindings say, by default nothing; every user and every container of the machine can reach it"`
	TLSCertFile         string        `koanf:"tls_cert_file" help:"certificate of the API on --listen, PEM; with it TLS 1.3 is spoken there, and clients need a certificate"`
	TLSKeyFile          string        `koanf:"tls_key_file" help:"key of that certificate, PEM"`
	TLSClientCAFile     string        `koanf:"tls_client_ca_file" help:"authorities whose certificates clients may have, PEM; the three files are read again when they change"`
	MetricsListen       string        `koanf:"metrics_listen" help:"serve metrics for Prometheus over HTTP on this address: a loopback host:port, or the path of a unix socket (default: nowhere)"`
	InitPath            string        `koanf:"init_path" help:"the workspace-init program (default: beside this one)"`
	Containerd          string        `koanf:"containerd" help:"socket of the containerd to use (default: /run/containerd/containerd.sock if it answers, else a private one is started)"`
	PrivateContainerd   bool          `koanf:"private_containerd" help:"start a private containerd even where one answers at the default address"`
	ContainerdNamespace string        `koanf:"containerd_namespace" help:"containerd namespace"`
	ContainerdBinary    string        `koanf:"containerd_binary" help:"the program for a private containerd"`
	RuntimeBinary       string        `koanf:"runtime_binary" help:"OCI runtime for the shim, such as /usr/bin/crun (default: the shim's own choice, runc)"`
	ImportImages        []string      `koanf:"import_images" help:"image tars (docker save or OCI layout) to import at start"`
	PlainHTTPRegistries []string      `koanf:"plain_http_registries" help:"registries, host[:port], that speak HTTP without TLS"`
	RegistryCAFiles     []string      `koanf:"registry_ca_files" help:"PEM files with certificate authorities of registries, besides the system's"`
	RegistryCertsDir    string        `koanf:"registry_certs_dir" help:"directory with settings of registries in containerd's certs.d layout: mirrors, certificates"`
	AllowPrivileged     bool          `koanf:"allow_privileged" help:"let workspaces ask for SECURITY_PROFILE_PRIVILEGED, which is root on this machine"`
	AllowedHostPaths    []string      `koanf:"allowed_host_paths" help:"directories of this machine that workspaces may mount, whole or in part: who may choose among all of them is root on it (default: none)"`
	LogLevel            string        `koanf:"log_level" help:"debug, info, warn or error"`
	LogFormat           string        `koanf:"log_format" help:"text or json"`
	CoreDumps           bool          `koanf:"core_dumps" help:"let the kernel write the daemon's memory, and the secrets in it, to a file when it crashes"`
	MaxConcurrentCycles int           `koanf:"max_concurrent_cycles" help:"how many workspaces may replace their container at the same time"`
	SecretVersions      int           `koanf:"secret_versions" help:"how many versions of each secret are kept, the current one among them, 1 to 100; with a lower number than before, what is above it goes with the secret's next change"`
	AuditMaxAge         time.Duration `koanf:"audit_max_age" help:"how long the audit log keeps an entry; 0: as long as there is room"`
	AuditMaxMiB         int           `koanf:"audit_max_mib" help:"how much of the database the audit log may take, in MiB; its oldest entries go then, about 2,300 are one"`
	AuditCopy           string        `koanf:"audit_copy" help:"where else the audit log's entries go, as lines of JSON: the path of a file, which may be rotated, or syslog (default: nowhere)"`
	RateLimit           int           `koanf:"rate_limit" help:"calls a second that a subject may make in the long run, twice as many at once; 0: any number"`
	MethodRateLimits    []string      `koanf:"method_rate_limits" help:"the same for single RPCs, each METHOD=CALLS-A-SECOND, like CreateWorkspace=10"`
	AnonymousRateLimit  int           `koanf:"anonymous_rate_limit" help:"calls a second from an address without credentials, such as health checks"`
	MaxCalls            int           `koanf:"max_calls" help:"calls of a subject at the same time, waits and watches included; 0: any number"`
	MaxStreams          int           `koanf:"max_streams" help:"how many of them may be streams, such as watches; 0: any number"`
	MaxConnections      int           `koanf:"max_connections" help:"connections to each of the API's sockets at the same time, from one address half as many; 0: any number"`
	MaxWorkspaces       int           `koanf:"max_workspaces" help:"how many workspaces there may be; 0: any number"`
	MaxSecrets          int           `koanf:"max_secrets" help:"how many secrets there may be in all; 0: any number"`
	MaxSecretsMiB       int           `koanf:"max_secrets_mib" help:"how much the values of all of them may take, in MiB; 0: any amount"`
	DrainTimeout        time.Duration `koanf:"drain_timeout" help:"how long calls and cycles in flight have to finish after SIGTERM"`
}

func defaultConfig() config {
	return config{
		DataDir:             "/var/lib/workspaced",
		StateDir:            "/run/workspaced",
		Bindings:            []string{"unix:socket-group admin"},
		Health:              string(access.ExposurePublic),
		Reflection:          string(access.ExposureAuthenticated),
		ContainerdNamespace: "workspaced",
		ContainerdBinary:    "containerd",
		ImportImages:        []string{},
		PlainHTTPRegistries: []string{},
		RegistryCAFiles:     []string{},
		AllowedHostPaths:    []string{},
		LogLevel:            "info",
		LogFormat:           "text",
		MaxConcurrentCycles: 4,
		SecretVersions:      store.DefaultSecretVersions,
		AuditMaxAge:         90 * 24 * time.Hour,
		AuditMaxMiB:         store.DefaultAuditBytes >> 20,
		RateLimit:           10_000,
		MethodRateLimits:    []string{},
		AnonymousRateLimit:  100,
		MaxCalls:            10_000,
		MaxStreams:          2_000,
		MaxConnections:      4_096,
		MaxWorkspaces:       200_000,
		MaxSecrets:          1_000_000,
		MaxSecretsMiB:       1_024,
		DrainTimeout:        30 * time.Second,
	}
}

// policy is what specs may ask of the machine.
func (c *config) policy() runtime.Policy {
	return runtime.Policy{AllowPrivileged: c.AllowPrivileged, HostPaths: c.AllowedHostPaths}
}

func (c *config) database() string { return filepath.Join(c.DataDir, "workspaced.db") }
func (c *config) keyFile() string  { return filepath.Join(c.DataDir, "workspaced.key") }

// fields calls do with each field's key, help text and default.
func fields(do func(key, help string, value any)) {
	v := reflect.ValueOf(defaultConfig())
	for i := range v.NumField() {
		f := v.Type().Field(i)
		do(f.Tag.Get("koanf"), f.Tag.Get("help"), v.Field(i).Interface())
	}
}

func flagName(key string) string { return strings.ReplaceAll(key, "_", "-") }

// addFlags makes a flag of every field, and --config.
func addFlags(flags *pflag.FlagSet) {
	flags.String("config", "", "configuration file, YAML (default "+defaultConfigFile+" if it is there)")
	fields(func(key, help string, value any) {
		name := flagName(key)
		switch v := value.(type) {
		case string:
			flags.String(name, v, help)
		case bool:
			flags.Bool(name, v, help)
		case int:
			flags.Int(name, v, help)
		case time.Duration:
			flags.Duration(name, v, help)
		case []string:
			flags.StringSlice(name, v, help)
		}
	})
}

// hideFlags keeps the flags of all but the given keys out of the help text. They
// still work: who repeats a daemon's flags must not be refused.
func hideFlags(flags *pflag.FlagSet, but []string) {
	fields(func(key, _ string, _ any) {
		if !slices.Contains(but, key) {
			flags.Lookup(flagName(key)).Hidden = true
		}
	})
}

// loadConfig reads defaults, file, environment and flags, in this order, and
// checks the outcome. Warnings are for the log once it is there.
func loadConfig(flags *pflag.FlagSet, environ []string) (cfg config, warnings []string, err error) {
	known := map[string]any{}
	fields(func(key, _ string, value any) { known[key] = value })
	k := koanf.New(".")
	if err := k.Load(confmap.Provider(known, "."), nil); err != nil {
		return config{}, nil, fmt.Errorf("configuration: %w", err)
	}
	origins := map[string]string{} // where a key's value comes from, unless it is the default
	path, err := configFile(flags, environ)
	if err != nil {
		return config{}, nil, err
	}
	if path != "" {
		if err := loadFile(k, known, origins, path); err != nil {
			return config{}, nil, err
		}
	}

	fromEnv := env.Provider(".", env.Opt{
		Prefix:      envPrefix,
		EnvironFunc: func() []string { return environ },
		TransformFunc: func(name, value string) (string, any) {
			key := strings.ToLower(strings.TrimPrefix(name, envPrefix))
			def, ok := known[key]
			switch {
			case !ok && name != envPrefix+"CONFIG":
				warnings = append(warnings, fmt.Sprintf("environment variable %s names no setting", name))
				return "", nil
			case !ok:
				return "", nil
			}
			origins[key] = "environment variable " + name
			if _, list := def.([]string); list {
				return key, splitList(value)
			}
			return key, value
		},
	})
	if err := k.Load(fromEnv, nil); err != nil {
		return config{}, nil, fmt.Errorf("configuration in the environment: %w", err)
	}
	fromFlags := posflag.ProviderWithFlag(flags, ".", nil, func(f *pflag.Flag) (string, any) {
		key := strings.ReplaceAll(f.Name, "-", "_")
		if _, ok := known[key]; !ok || !f.Changed {
			return "", nil
		}
		origins[key] = "flag --" + f.Name
		return key, posflag.FlagVal(flags, f)
	})
	if err := k.Load(fromFlags, nil); err != nil {
		return config{}, nil, fmt.Errorf("configuration in flags: %w", err)
	}

	if err := decode(k, &cfg); err != nil {
		return config{}, nil, withOrigin(err, origins)
	}
	if cfg.Socket == "" {
		cfg.Socket = filepath.Join(cfg.StateDir, "workspaced.sock")
	}
	return cfg, warnings, withOrigin(cfg.check(), origins)
}

// settingError is what is wrong with one setting.
type settingError struct {
	key string
	err error
}

func (e *settingError) Error() string { return e.key + ": " + e.err.Error() }
func (e *settingError) Unwrap() error { return e.err }

// bad makes a settingError.
func bad(key, format string, args ...any) error {
	return &settingError{key, fmt.Errorf(format, args...)}
}

// withOrigin adds to a settingError in which file, variable or flag the value
// stands: it may be one that the reader did not think of.
func withOrigin(err error, origins map[string]string) error {
	var setting *settingError
	if errors.As(err, &setting) && origins[setting.key] != "" {
		return fmt.Errorf("%w (from %s)", err, origins[setting.key])
	}
	return err
}

// configFile says which file is to be read; empty: none.
func configFile(flags *pflag.FlagSet, environ []string) (string, error) {
	if path, err := flags.GetString("config"); err == nil && path != "" {
		return path, nil
	}
	for _, kv := range environ {
		if path, ok := strings.CutPrefix(kv, envPrefix+"CONFIG="); ok && path != "" {
			return path, nil
		}
	}
	switch _, err := os.Stat(defaultConfigFile); {
	case err == nil:
		return defaultConfigFile, nil
	case errors.Is(err, fs.ErrNotExist):
		return "", nil
	default:
		return "", fmt.Errorf("configuration file: %w", err)
	}
}

// loadFile reads the file and refuses what it does not know: a setting with a
// typing error must not be silently without effect.
func loadFile(k *koanf.Koanf, known map[string]any, origins map[string]string, path string) error {
	f := koanf.New(".")
	if err := f.Load(file.Provider(path), yaml.Parser()); err != nil {
		return fmt.Errorf("configuration file %s: %s", path, oneLine(err))
	}
	for key, value := range f.Raw() {
		if value == nil { // `key:` with nothing behind it
			f.Delete(key)
		}
		if _, ok := known[key]; ok {
			origins[key] = "configuration file " + path
			continue
		}
		return fmt.Errorf("configuration file %s: unknown key %q; the keys are %s", path, key, strings.Join(sortedKeys(known), ", "))
	}
	return k.Merge(f)
}

func sortedKeys(m map[string]any) (keys []string) {
	for key := range m {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}

// decode turns what was read into cfg. Errors name the key and what was read.
func decode(k *koanf.Koanf, cfg *config) error {
	v := reflect.ValueOf(cfg).Elem()
	for i := range v.NumField() {
		key := v.Type().Field(i).Tag.Get("koanf")
		value := k.Get(key)
		d, err := mapstructure.NewDecoder(&mapstructure.DecoderConfig{
			Result:           v.Field(i).Addr().Interface(),
			WeaklyTypedInput: true,
			DecodeHook:       mapstructure.StringToTimeDurationHookFunc(),
		})
		if err == nil {
			err = d.Decode(value)
		}
		if _, bare := value.(int); bare && v.Field(i).Kind() == reflect.Int64 {
			err = errors.New("a duration without its unit")
		}
		if err != nil || value == nil {
			return bad(key, "%v is no %s", value, kindName(v.Field(i).Interface()))
		}
	}
	return nil
}

func kindName(v any) string {
	switch v.(type) {
	case bool:
		return "truth value (true or false)"
	case int:
		return "number"
	case time.Duration:
		return "duration, such as 30s or 1m"
	case []string:
		return "list of strings"
	default:
		return "string"
	}
}

func splitList(s string) []string {
	list := []string{}
	for part := range strings.SplitSeq(s, ",") {
		if part = strings.TrimSpace(part); part != "" {
			list = append(list, part)
		}
	}
	return list
}

func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }

// check says in one sentence what is wrong, and makes paths absolute.
func (c *config) check() error {
	for _, p := range []struct {
		key  string
		path *string
	}{{"data_dir", &c.DataDir}, {"state_dir", &c.StateDir}, {"socket", &c.Socket}, {"init_path", &c.InitPath}, {"containerd", &c.Containerd}, {"registry_certs_dir", &c.RegistryCertsDir}, {"tls_cert_file", &c.TLSCertFile}, {"tls_key_file", &c.TLSKeyFile}, {"tls_client_ca_file", &c.TLSClientCAFile}} {
		if *p.path == "" {
			if p.key == "data_dir" || p.key == "state_dir" {
				return bad(p.key, "must not be empty")
			}
			continue
		}
		abs, err := filepath.Abs(strings.TrimPrefix(*p.path, "unix://"))
		if err != nil {
			return &settingError{p.key, err}
		}
		*p.path = abs
	}
	for key, paths := range map[string][]string{"import_images": c.ImportImages, "registry_ca_files": c.RegistryCAFiles} {
		for i, path := range paths {
			abs, err := filepath.Abs(path)
			if err != nil {
				return &settingError{key, err}
			}
			paths[i] = abs
		}
	}
	// A relative one would mean something else with each directory that the daemon
	// is started in.
	for i, path := range c.AllowedHostPaths {
		if !filepath.IsAbs(path) {
			return bad("allowed_host_paths", "%q is not absolute", path)
		}
		c.AllowedHostPaths[i] = filepath.Clean(path)
	}
	if err := checkSocketPath("socket", c.Socket); err != nil {
		return err
	}
	if err := c.checkKeys(); err != nil {
		return err
	}
	if c.Containerd != "" && c.PrivateContainerd {
		return bad("containerd", "only one of containerd and private_containerd can be set")
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.LogLevel)); err != nil {
		return bad("log_level", "%q is none of debug, info, warn, error", c.LogLevel)
	}
	if c.LogFormat != "text" && c.LogFormat != "json" {
		return bad("log_format", "%q is none of text, json", c.LogFormat)
	}
	if c.MaxConcurrentCycles < 1 {
		return bad("max_concurrent_cycles", "%d is less than 1", c.MaxConcurrentCycles)
	}
	if c.SecretVersions < 1 || c.SecretVersions > store.MaxSecretVersions {
		return bad("secret_versions", "%d is not between 1 and %d", c.SecretVersions, store.MaxSecretVersions)
	}
	if c.DrainTimeout <= 0 {
		return bad("drain_timeout", "%v is not more than 0", c.DrainTimeout)
	}
	for key, exposure := range map[string]string{"health": c.Health, "reflection": c.Reflection} {
		switch access.Exposure(exposure) {
		case access.ExposurePublic, access.ExposureAuthenticated, access.ExposureOff:
		default:
			return bad(key, "%q is none of public, authenticated, off", exposure)
		}
	}
	if err := c.checkAudit(); err != nil {
		return err
	}
	if _, err := c.limits(); err != nil {
		return err
	}
	if err := c.checkListen(); err != nil {
		return err
	}
	return c.checkMetricsListen()
}

// limits are what one caller can take.
func (c *config) limits() (server.Limits, error) {
	for key, n := range map[string]int{
		"rate_limit": c.RateLimit, "anonymous_rate_limit": c.AnonymousRateLimit, "max_calls": c.MaxCalls, "max_streams": c.MaxStreams,
		"max_connections": c.MaxConnections, "max_workspaces": c.MaxWorkspaces, "max_secrets": c.MaxSecrets, "max_secrets_mib": c.MaxSecretsMiB,
	} {
		if n < 0 || n > 1<<30 {
			return server.Limits{}, bad(key, "%d is not between 0 and %d", n, 1<<30)
		}
	}
	methods := make(map[string]int)
	for _, s := range c.MethodRateLimits {
		name, text, _ := strings.Cut(s, "=")
		n, err := strconv.Atoi(text)
		if err != nil || n < 1 || n > 1<<30 {
			return server.Limits{}, bad("method_rate_limits", "%q is no METHOD=CALLS-A-SECOND", s)
		}
		if !server.HasMethod(name) {
			return server.Limits{}, bad("method_rate_limits", "there is no RPC %s", name)
		}
		methods[name] = n
	}
	return server.Limits{
		Rate: c.RateLimit, MethodRates: methods, NobodyRate: c.AnonymousRateLimit, Calls: c.MaxCalls, Streams: c.MaxStreams,
	}, nil
}

func (c *config) quotas() store.Quotas {
	return store.Quotas{Workspaces: int64(c.MaxWorkspaces), Secrets: int64(c.MaxSecrets), Bytes: int64(c.MaxSecretsMiB) << 20}
}

func (c *config) checkAudit() error {
	if c.AuditMaxAge < 0 {
		return bad("audit_max_age", "%v is less than 0", c.AuditMaxAge)
	}
	if c.AuditMaxMiB < 1 || c.AuditMaxMiB > 4096 {
		return bad("audit_max_mib", "%d is not between 1 and 4096", c.AuditMaxMiB)
	}
	if c.AuditCopy == "" || c.AuditCopy == auditSyslog {
		return nil
	}
	path, err := filepath.Abs(c.AuditCopy)
	if err != nil {
		return &settingError{"audit_copy", err}
	}
	c.AuditCopy = path
	return nil
}

func checkSocketPath(key, path string) error {
	if len(path) > 107 {
		return bad(key, "path %s has %d bytes, the kernel takes 107", path, len(path))
	}
	return nil
}

// isLoopback reports whether only this machine can reach a host:port.
func isLoopback(address string) (bool, error) {
	host, _, err := net.SplitHostPort(address)
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback(), err
}

// checkListen allows TCP with TLS anywhere, in plain text on loopback if that was
// asked for, and nothing else.
func (c *config) checkListen() error {
	files := []struct{ key, path string }{
		{"tls_cert_file", c.TLSCertFile}, {"tls_key_file", c.TLSKeyFile}, {"tls_client_ca_file", c.TLSClientCAFile},
	}
	set := slices.IndexFunc(files, func(f struct{ key, path string }) bool { return f.path != "" })
	if set >= 0 {
		for _, f := range files {
			if f.path == "" {
				return bad(f.key, "is missing: TLS needs tls_cert_file, tls_key_file and tls_client_ca_file")
			}
		}
	}
	if c.Listen == "" {
		if set >= 0 {
			return bad(files[set].key, "is for the API on TCP, and listen is not set")
		}
		return nil
	}
	local, err := isLoopback(c.Listen)
	switch {
	case err != nil:
		return bad("listen", "%q is no host:port", c.Listen)
	case set >= 0 && c.Insecure:
		return bad("insecure", "is for plain text, and there are TLS files: set one or the other")
	case set >= 0:
		return nil
	case !local:
		return bad("listen", "%s is no loopback address, and without TLS everybody could read and write what is said: set tls_cert_file, tls_key_file and tls_client_ca_file", c.Listen)
	case !c.Insecure:
		return bad("listen", "the API on %s would be plain text, open to every local user: set the three tls_ files, or say --insecure if that is meant", c.Listen)
	}
	return nil
}

// metricsSocket is the path in metrics_listen; empty: it has none.
func (c *config) metricsSocket() string {
	if filepath.IsAbs(c.MetricsListen) {
		return c.MetricsListen
	}
	return ""
}

func (c *config) checkMetricsListen() error {
	c.MetricsListen = strings.TrimPrefix(c.MetricsListen, "unix://")
	if c.MetricsListen == "" {
		return nil
	}
	if path := c.metricsSocket(); path != "" {
		if path == c.Socket {
			return bad("metrics_listen", "%s is the socket of the API", path)
		}
		return checkSocketPath("metrics_listen", path)
	}
	switch local, err := isLoopback(c.MetricsListen); {
	case err != nil:
		return bad("metrics_listen", "%q is neither host:port nor an absolute path", c.MetricsListen)
	case !local:
		return bad("metrics_listen", "%s is no loopback address, and metrics are plain text without authentication: use 127.0.0.1 or a unix socket", c.MetricsListen)
	}
	return nil
}

// yaml renders the configuration as a file that would bring it about.
func (c *config) yaml() ([]byte, error) {
	m := map[string]any{}
	v := reflect.ValueOf(*c)
	for i := range v.NumField() {
		value := v.Field(i).Interface()
		if d, ok := value.(time.Duration); ok {
			value = d.String()
		}
		m[v.Type().Field(i).Tag.Get("koanf")] = value
	}
	return yaml.Parser().Marshal(m)
}
